"""Jobs in which one rank is gone and another is slow, and groups that are dropped before a peer has received."""

import os
import signal
import time
from pathlib import Path

import torch

from support.lost_ranks import Report, leave_note, report_of
from support.pairs import Pair
from tokenferry import MoeShape, PeerTimeout, Routing

SHAPE = MoeShape(num_experts=6, top_k=1, hidden=64, max_tokens=12)
SLOW_S = 20.0
DEADLINE_S = 30.0
HALF_S = 0.5
ROUTING = Routing(torch.arange(12).remainder(6)[:, None], torch.ones(12, 1))
"""Two tokens of each rank for each expert."""


def one_gone_one_slow(rank: int, pg, pair: Pair, folder: str) -> Report | None:
    """Rank 1 is killed; return what rank 2, which waits for rank 0 first, reports. Rank 0 does not call before that."""
    with pair.open(pg, SHAPE, timeout_s=DEADLINE_S) as group:
        group.dispatch(torch.ones(12, 64), ROUTING)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0:
            deadline = time.monotonic() + SLOW_S
            while not Path(folder, "2 has reported").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            return None
        start = time.monotonic()
        try:
            group.dispatch(torch.ones(12, 64), ROUTING)
        except PeerTimeout as error:
            report = report_of(error, time.monotonic() - start)
            leave_note(folder, rank, "has reported")
            return report
    raise AssertionError("the call returned")


def masked_behind_a_slow_one(rank: int, pg, pair: Pair) -> tuple[list[float], list[int]] | None:
    """The same in a decode call that masks: return the rows of rank 2's first expert, and the ranks that are masked."""
    with pair.open(pg, SHAPE, timeout_s=DEADLINE_S, on_timeout="mask") as group:
        group.decode_dispatch(torch.ones(12, 64), ROUTING)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(HALF_S if rank == 0 else 0.0)
        sent = group.decode_dispatch(torch.full((12, 64), 1.0 + rank), ROUTING)
        rows = sent.x[0, : int(sent.expert_counts[0]), 0]
        return rows.tolist(), sorted(group.masked_ranks)


def dropped_before_the_peer_receives(rank: int, pg, pair: Pair) -> list[float]:
    """Rank 0 needs its group no more once it has received; rank 1 calls its hook later."""
    group = pair.open(pg, MoeShape(4, 1, 64, 16), timeout_s=5.0)
    routing = Routing(torch.arange(8).remainder(4)[:, None])
    sent = group.decode_dispatch(torch.full((8, 64), 1.0 + rank), routing, return_hook=True)
    time.sleep(HALF_S if rank == 1 else 0.0)
    sent.hook()
    rows = sent.x[0, : int(sent.expert_counts[0]), 0].tolist()
    del sent, group
    pg.barrier().wait()
    return rows
