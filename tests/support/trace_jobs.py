"""Time stamps that kernels could have recorded, and jobs of ranks that return them."""

import torch

from tokenferry.bench.core.checks import WrongAnswer
from tokenferry.kernels.control_block import TRACE, TRACE_ROWS, TRACE_SIGNATURE, TRACE_WORDS

T0 = 1_760_000_000_000_000_000
"""Nanoseconds of a GPU's clock do not fit a float."""


def block(signature=None, rows=None, **marks):
    """``[W]``: nanoseconds after T0."""
    words = torch.zeros(TRACE_WORDS, dtype=torch.int64)
    for name, ns in marks.items():
        words[TRACE[name]] = T0 + ns
    for first, times in ((TRACE_SIGNATURE, signature or {}), (TRACE_ROWS, rows or {})):
        for rank, ns in times.items():
            words[first + rank] = T0 + ns
    return words


def messages(begins, way):
    """``[R, 1, W]``: one call: rank r sends at begins[r]; a message takes way[a][b] from a to b, if b waits for it."""
    num_ranks = len(begins)
    blocks = []
    for b in range(num_ranks):
        asks = begins[b] + 1500
        signature = {a: max(begins[a] + way[a][b], asks) for a in range(num_ranks) if a != b}
        blocks.append(block(start=begins[b] - 700, ready=begins[b], sent=asks, signature=signature))
    return torch.stack(blocks)[:, None]


def calls(num_ranks, way, late=30_000, num_calls=64):
    """``[N, R, 1, W]``: calls in which each rank is late in turn, on one clock."""
    found = []
    for i in range(num_calls):
        begins = [
            i * 100_000 + (late if i % num_ranks == r else 137 * ((i * 7 + r * 3) % 11)) for r in range(num_ranks)
        ]
        found.append(messages(begins, way))
    return torch.stack(found)


def shifted(words, offsets):
    """The same as recorded by clocks with offsets; ``[..., R, B, W]``."""
    return torch.where(words > 0, words + torch.tensor(offsets).view(-1, 1, 1), 0)


DISPATCH = torch.stack(
    [
        torch.stack(
            [
                block(start=1000, ready=2000, sent=5000, counts=6500, end=9000, rows={0: 7000, 1: 8800}),
                block(start=1100, ready=2200, sent=6200, counts=6600, end=9900, rows={0: 7100, 1: 9700}),
                block(start=1050, ready=2100, sent=3100, signature={1: 5600}, counts=6000, end=6000),
            ]
        ),
        torch.stack(
            [
                block(start=2000, ready=3000, sent=6000, counts=7500, end=9500, rows={0: 9000, 1: 8000}),
                block(start=2100, ready=3200, sent=7200, counts=7600, end=9600, rows={0: 9400}),
                block(start=2050, ready=4000, sent=5000, signature={0: 5200}, counts=7000, end=7000),
            ]
        ),
    ]
)
"""One dispatch of two ranks, on one clock: rank 1 begins a microsecond later; messages leave at 2100 and 4000."""

COMBINE = torch.where(DISPATCH > 0, DISPATCH + 20_000, 0)
COMBINE[..., TRACE["counts"]] = 0
OFFSETS = (0, 123_456)
WAY = [[0, 1300], [1300, 0]]


def recorded(rank, pg, sizes, names):
    """As `iterations.record_calls`: two ranks whose clocks differ; rank 1 has a block less."""
    words = {"clocks": calls(2, WAY), "decode_dispatch": DISPATCH, "decode_combine": COMBINE}
    mine = {name: shifted(one, OFFSETS).select(-3, rank) for name, one in words.items() if name in (*names, "clocks")}
    return {name: one if name == "clocks" or rank == 0 else one[1:] for name, one in mine.items()}


def wrong(rank, pg, *args):
    raise WrongAnswer("decode round trip: outside the bound by up to 3 (or NaN)")
