"""R whole groups in one process: one window, one thread and one stream a rank. Run by test_virtual_group.py.

Threads enqueue kernels that wait for kernels that other threads have not enqueued yet. So each stream needs a queue of
its own, and nothing may be loaded or allocated while ranks wait for each other: a process for this alone, whose
environment says so before CUDA starts.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

import throughput
from on_device import OnDevice

from tokenferry import Delivery, Layout, MoeShape
from tokenferry.backends.base import Resolved
from tokenferry.backends.cuda_setup import assemble
from tokenferry.kernels.board import BOARD_BYTES
from tokenferry.memory.window import share_in_process
from tokenferry.testing.cases import Case

TIMEOUT_S = 60.0
HEAP_BYTES = 32 << 20
NUM_SMS = 2
DELIVERIES = (
    Delivery(),
    Delivery(counts="device"),
    Delivery(Layout.EXPERTS, alignment=8, zero_padding=True),
    Delivery(Layout.EXPERTS, alignment=3, counts="device", zero_padding=True),
    Delivery(Layout.MASKED, zero_padding=True),
    Delivery(Layout.MASKED, counts="device"),
)

# All ranks judge by the same oracles, and threads take turns at them.
throughput.oracle_for = functools.cache(throughput.oracle_for)


class Narrow(OnDevice):
    """A group whose calls take so few SMs that those of all ranks find room beside each other."""

    def dispatch(self, x, routing, **options):
        return super().dispatch(x, routing, num_sms=NUM_SMS, **options)

    def redispatch(self, x, plan, **options):
        return super().redispatch(x, plan, num_sms=NUM_SMS, **options)

    def combine(self, y, plan, **options):
        return super().combine(y, plan, num_sms=NUM_SMS, **options)


def cases(ranks: int) -> list[Case]:
    uneven = (6, 0, 9, 3, 1, 4, 0, 7)[:ranks]
    return [
        Case(uneven, 2 * ranks, 2),
        Case(uneven[::-1], 3 * ranks, 4, hidden=36, dtype=torch.float32, idx_dtype=torch.int32, routing="repeated"),
        Case(uneven, 2 * ranks, 8, hidden=8, dtype=torch.float16, routing="half_dropped", weights=False),
    ]


def make_groups(ranks: int, shape: MoeShape, folder: str) -> list[Narrow]:
    """One group a rank, everything compiled and loaded."""
    resolved = Resolved(shape, "cuda", "auto", TIMEOUT_S, False, None, folder)
    groups = []
    for window in share_in_process(ranks, torch.device("cuda", 0), BOARD_BYTES + HEAP_BYTES):
        backend = assemble(window, resolved, "virtual", ("virtual ranks", lambda: None))
        backend.warmup()
        group = object.__new__(Narrow)
        group._adopt(backend, shape, TIMEOUT_S)
        groups.append(group)
    return groups


def rank_job(group: Narrow, stream: torch.cuda.Stream) -> None:
    """Every case in every layout, with the checks of the contract."""
    torch.cuda.set_device(0)
    with torch.cuda.stream(stream):
        for case in cases(group.num_ranks):
            for delivery in DELIVERIES:
                throughput.check_round_trip(group.for_shape(case.shape), case, delivery)
        group.synchronize()
        stream.synchronize()


def fill_pools(stream: torch.cuda.Stream) -> None:
    """Let torch's allocator have memory for a stream: to get more from the driver may wait for what runs."""
    with torch.cuda.stream(stream):
        held = [torch.empty(1 << 20, dtype=torch.uint8, device="cuda") for _ in range(16)]
        held.append(torch.empty(64 << 20, dtype=torch.uint8, device="cuda"))
    stream.synchronize()


def run(ranks: int, folder: str) -> list[str]:
    """Run all ranks; returns what went wrong, a text a rank."""
    groups = make_groups(ranks, cases(ranks)[0].shape, folder)
    streams = [torch.cuda.Stream() for _ in range(ranks)]
    for stream in streams:
        fill_pools(stream)
    for case in cases(ranks):
        for delivery in DELIVERIES:
            throughput.oracle_for(case, delivery)
    torch.cuda.synchronize()
    wrong: list[str] = []

    def job(rank: int) -> None:
        try:
            rank_job(groups[rank], streams[rank])
        except Exception:  # noqa: BLE001 - whatever it was, the main thread tells it
            wrong.append(f"--- virtual rank {rank} of {ranks}:\n{traceback.format_exc()}")

    threads = [threading.Thread(target=job, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for group in groups:
        group.close()
    return wrong


def main() -> int:
    """Every number of ranks on the command line, after a rank alone: that one loads what torch loads late."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, *map(int, sys.argv[1:])):
            wrong = run(ranks, folder)
            if wrong:
                sys.stderr.write("\n".join(wrong))
                return 1
            sys.stdout.write(f"{ranks} virtual ranks: all right\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
