"""The demo's verdict: whether two runs differ by no more than rounding can explain.

Both runs compute the same sums in another order, so that a loss near 5 may differ by a few units in the last place, and
stays so near while all tokens go to the same experts. `SAME_ROUTING` allows ten units in float32 (5e-7 each). In
float64 a unit is 9e-16, but gate weights travel as float32: where the order of a sum decides how one is rounded, it
moves by 6e-8, and the loss of its batch by some 1e-10; ten times that is allowed. Trials stayed below 1e-6 and 2e-15.

On GPUs ten times as much is allowed (`GPU_FACTOR`). There the order of sums depends on more: cuBLAS cuts them up as
suits the shape of a matrix, which differs between a share of the batch and the whole, and gradients of embeddings are
added up by atomics, so that not even one run repeats itself. In float64 this moves sums by no more than on the CPU, but
more often, so that more gate weights may be rounded otherwise. TF32 is off, as torch has it unless told otherwise.

In float32 two experts will sooner or later be so close for some token that rounding decides between them. The row then
goes elsewhere, and from this step on the runs are two trainings that began a hair apart, which training drives away
from each other. Such a step is accepted if it moves but a few rows; from there on the losses may differ by
`OTHER_ROUTING`, less than they vary from one batch to the next. In trials the runs parted after 60 to 260 steps, by one
row, and were then apart by up to 0.015. In float64 this has not been seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

GPU_FACTOR = 10
SAME_ROUTING = {torch.float32: 5e-6, torch.float64: 1e-9}
OTHER_ROUTING = 0.1
MOVED_ROWS = 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """How two runs compare.

    Attributes:
        same: They differ by rounding only.
        text: What was found and what is allowed.
    """

    same: bool
    text: str


def compare(
    losses: tuple[Sequence[float], Sequence[float]],
    expert_tokens: tuple[Sequence[list[int]], Sequence[list[int]]],
    dtype: torch.dtype,
    device: str = "cpu",
) -> Verdict:
    """Compare the losses and the rows per expert of two runs, step by step.

    Args:
        losses: Of each run, one a step.
        expert_tokens: Of each run, ``[E]`` a step.
        dtype: In which they computed: float32 or float64.
        device: Where: ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: the runs have different lengths, or none.
    """
    apart = [abs(a - b) for a, b in zip(*losses, strict=True)]
    moved = [sum(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(*expert_tokens, strict=True)]
    if not apart or len(moved) != len(apart):
        raise ValueError(f"compare: expected as many losses as counts, and some; got {len(apart)} and {len(moved)}")
    parted = next((step for step, rows in enumerate(moved) if rows), len(moved))
    before, after = _largest(apart[:parted]), _largest(apart[parted:])
    name = str(dtype).removeprefix("torch.")
    allowed = SAME_ROUTING[dtype] * (GPU_FACTOR if device == "cuda" else 1)
    text = (
        f"while all rows go to the same experts ({parted} of {len(moved)} steps) the losses differ by at most "
        f"{before:.1e}; {allowed:.0e} is allowed, for {name} sums in another order"
    )
    good = before <= allowed
    if parted < len(moved):
        rows = (moved[parted] + 1) // 2  # a row that moved is missed by one expert and counted by another
        good &= rows <= MOVED_ROWS and after <= OTHER_ROUTING
        text += (
            f"\nat step {parted + 1} {rows} row(s) go to another expert, {MOVED_ROWS} are allowed, as rounding decides "
            f"between nearly equal ones; since then the losses differ by at most {after:.1e}; {OTHER_ROUTING} is "
            "allowed"
        )
    return Verdict(good, text)


def _largest(values: Sequence[float]) -> float:
    """The largest, 0 without any; NaN is larger than all."""
    return max(values, key=lambda value: value if value == value else float("inf"), default=0.0)
