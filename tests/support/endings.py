"""A program with a world whose ranks are in the middle of a job, for tests that kill it: ``python endings.py``.

Once all ranks are at work it prints the process id of another process that it has forked.
"""

import ctypes
import os
import signal
import sys
import time

import torch

from tokenferry import ExpertGroup, MoeShape, Routing
from tokenferry.testing.world import World

BUSY_S = 120.0
"""Seconds that the ranks would go on, did they not end with their program."""


def at_work(rank, pg, progress):
    """Rank 0 waits for its peers in a call, rank 1 runs code that lets no other thread run, rank 2 is stopped."""
    group = ExpertGroup(pg, MoeShape(3, 1, 16, 8), backend="cpu", timeout_s=BUSY_S)
    progress({"rank": rank})
    if rank == 0:
        group.dispatch(torch.ones(3, 16), Routing(torch.tensor([[0], [1], [2]])))
    if rank == 1:
        ctypes.PyDLL(None).sleep(int(BUSY_S))
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)


def main():
    world = World(3, timeout_s=BUSY_S)
    forked = os.fork()
    if forked == 0:  # inherits all descriptors, and goes on when the program is killed
        time.sleep(BUSY_S)
        os._exit(0)
    ready = []

    def note(item):
        ready.append(item["rank"])
        if len(ready) == 3:
            sys.stdout.write(f"{forked}\n")
            sys.stdout.flush()

    world.run_with_progress(at_work, on_item=note)


if __name__ == "__main__":
    main()
