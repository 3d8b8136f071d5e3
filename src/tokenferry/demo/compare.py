"""Compare two training runs: whether they differ by no more than rounding explains.

Both runs compute the same sums in a different order. A loss near 5 may therefore differ by a few units in the last
place, and the difference does not grow while all tokens go to the same experts. `SAME_ROUTING` allows ten units in
float32 (5e-7 each). In float64 a unit is 9e-16, but gate weights are sent as float32: where the order of a sum changes
how a weight is rounded, the weight moves by 6e-8 and the loss of its batch by some 1e-10; ten times that is allowed. In
trial runs the differences stayed below 1e-6 and 2e-15.

On GPUs ten times as much is allowed (`GPU_FACTOR`), because the order of sums depends on more: cuBLAS splits them
according to the shape of a matrix, which differs between a share of the batch and the whole batch, and gradients of
embeddings are added by atomics, so that not even one run is reproducible. In float64 the sums move by no more than on
the CPU, but more gate weights may be rounded differently. TF32 is off, which is torch's default.

In float32, two experts will sooner or later be so close for some token that rounding decides between them. The row then
goes to another expert, and from this step on the two trainings diverge. Such a step is accepted if it moves only a few
rows. After it the losses may differ by `OTHER_ROUTING`, which is less than they vary from one batch to the next. In
trial runs this happened after 60 to 260 steps, by one row, and the losses then differed by up to 0.015. In float64 it
has not been seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenferry.demo.train import History

GPU_FACTOR = 10
SAME_ROUTING = {torch.float32: 5e-6, torch.float64: 1e-9}
OTHER_ROUTING = 0.1
MOVED_ROWS = 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a comparison.

    Attributes:
        same: Whether the runs differ by rounding only.
        text: The differences found, and those allowed.
    """

    same: bool
    text: str


def compare(sharded: History, dense: History, dtype: torch.dtype, device: str = "cpu") -> Verdict:
    """Compare the losses and the rows per expert of two runs, step by step.

    Args:
        sharded: The run over ranks.
        dense: The run in one process.
        dtype: The dtype of parameters and rows: float32 or float64.
        device: The device of both runs: ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: the runs have different lengths, or no steps.
    """
    differences = [abs(a - b) for a, b in zip(sharded.losses, dense.losses, strict=True)]
    moved = [
        sum(abs(a - b) for a, b in zip(x, y, strict=True))
        for x, y in zip(sharded.expert_tokens, dense.expert_tokens, strict=True)
    ]
    if not differences or len(moved) != len(differences):
        raise ValueError(
            f"compare: expected as many losses as counts, and at least one; got {len(differences)} and {len(moved)}"
        )
    diverged = next((step for step, rows in enumerate(moved) if rows), len(moved))
    before, after = _largest(differences[:diverged]), _largest(differences[diverged:])
    name = str(dtype).removeprefix("torch.")
    allowed = SAME_ROUTING[dtype] * (GPU_FACTOR if device == "cuda" else 1)
    text = (
        f"while all rows go to the same experts ({diverged} of {len(moved)} steps) the losses differ by at most "
        f"{before:.1e}; {allowed:.0e} is allowed, for {name} sums in another order"
    )
    same = before <= allowed
    if diverged < len(moved):
        rows = (moved[diverged] + 1) // 2  # a moved row is missing at one expert and extra at another
        same &= rows <= MOVED_ROWS and after <= OTHER_ROUTING
        text += (
            f"\nat step {diverged + 1} {rows} row(s) go to another expert; {MOVED_ROWS} are allowed, since rounding "
            f"decides between nearly equal experts; from there on the losses differ by at most {after:.1e}; "
            f"{OTHER_ROUTING} is allowed"
        )
    return Verdict(same, text)


def _largest(values: Sequence[float]) -> float:
    """Return the largest value, 0 without any; NaN counts as the largest."""
    return max(values, key=lambda value: value if value == value else float("inf"), default=0.0)
