"""Waits that ranks with GPUs could have counted, for the tests of `tokenferry diagnose`."""

import torch

from support.trace_jobs import block, wrong
from tokenferry.bench.profile.iterations import Waited

__all__ = ["late_rows", "wrong"]


def late_rows(rank, pg, settings):
    """As `iterations.count_waits`, two ranks: rows of rank 1 come 80 us later than those of rank 0."""
    assert settings.backend == "cuda"
    peer = 1 - rank
    waits = torch.full((2,), 1300 * settings.iterations, dtype=torch.int64)
    waits[rank] = 0
    come = 10_000 + 80_000 * peer
    words = torch.stack(
        [
            torch.stack([block(start=i, rows={rank: 3000, peer: 5000 + come}), block(start=i, signature={peer: 5000})])
            for i in range(settings.iterations)
        ]
    )
    return Waited(waits, waits, 400_000.0 * settings.iterations, words)
