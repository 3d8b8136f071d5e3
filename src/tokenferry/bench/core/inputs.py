"""Random inputs that every rank can make for every rank, and what has to come of them.

Nothing here calls the library: a rank knows what it must receive because it can draw its peers' inputs itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class WrongAnswer(RuntimeError):  # noqa: N818 - reads as what happened
    """A call delivered something else than it has to; no time is printed for it."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What is measured.

    Args:
        ranks: R.
        tokens: T, on every rank.
        hidden: H.
        top_k: K.
        experts: E.
        iters: Iterations that count, of each call and mode.
        warmup: Iterations before them.
        seed: Of inputs; each run of the command draws another.
    """

    ranks: int
    tokens: int
    hidden: int
    top_k: int
    experts: int
    iters: int
    warmup: int
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What one rank brings: ``x`` ``[T, H]`` bfloat16, ``topk_idx`` ``[T, K]`` int64, ``topk_weights`` float32."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor


def draw(spec: Spec, variant: int, rank: int) -> Inputs:
    """Draw the inputs of one rank: normal rows, K distinct experts of uniform probability, softmax weights."""
    generator = torch.Generator().manual_seed((spec.seed * 64 + variant) * 4096 + rank)
    x = torch.randn(spec.tokens, spec.hidden, generator=generator).bfloat16()
    topk_idx = torch.rand(spec.tokens, spec.experts, generator=generator).topk(spec.top_k, dim=1).indices
    weights = torch.randn(spec.tokens, spec.top_k, generator=generator).softmax(1)
    return Inputs(x, topk_idx, weights)


def sent_to(spec: Spec, inputs: Inputs) -> Tensor:
    """``[T, R]`` bool: the ranks that hold a chosen expert of each token."""
    ranks = inputs.topk_idx // (spec.experts // spec.ranks)
    return torch.stack([(ranks == r).any(1) for r in range(spec.ranks)], 1)


def expert(y: Tensor, index: int) -> Tensor:
    """What expert (or rank) ``index`` answers: each another multiple, so that a row gone astray shows."""
    return (y.float() * (1 + index / 8)).to(y.dtype)


def expected_rows(spec: Spec, variant: int, rank: int) -> Tensor:
    """``[N, H]``: what dispatch must deliver to ``rank``: by source rank, then token."""
    rows = []
    for source in range(spec.ranks):
        inputs = draw(spec, variant, source)
        rows.append(inputs.x[sent_to(spec, inputs)[:, rank]])
    return torch.cat(rows)


def expected_sums(spec: Spec, inputs: Inputs) -> Tensor:
    """``[T, H]``: what combine must return if rank r answers ``expert(row, r)``: float32, rank order, one rounding."""
    total = torch.zeros(spec.tokens, spec.hidden)
    for r, here in enumerate(sent_to(spec, inputs).unbind(1)):
        total[here] += expert(inputs.x[here], r).float()
    return total.bfloat16()


def expected_decode_rows(spec: Spec, variant: int, global_expert: int) -> Tensor:
    """``[count, H]``: the rows that one expert must receive: by source rank, then token."""
    rows = []
    for source in range(spec.ranks):
        inputs = draw(spec, variant, source)
        rows.append(inputs.x[(inputs.topk_idx == global_expert).any(1)])
    return torch.cat(rows)


def expected_decode_sums(spec: Spec, inputs: Inputs) -> Tensor:
    """``[T, H]``: exact decode combine of ``expert(row, e)``: slot order, every product and sum rounded to float32."""
    total = torch.zeros(spec.tokens, spec.hidden)
    factors = 1 + inputs.topk_idx.float() / 8
    for k in range(spec.top_k):
        answer = (inputs.x.float() * factors[:, k : k + 1]).bfloat16().float()
        product = answer * inputs.topk_weights[:, k : k + 1]
        total = total + product
    return total.bfloat16()


def must_equal(what: str, got: Tensor, expected: Tensor) -> None:
    """Check shape and every bit.

    Raises:
        WrongAnswer: names ``what`` and the first row that differs.
    """
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise WrongAnswer(
            f"{what}: expected {expected.dtype} {list(expected.shape)}, got {got.dtype} {list(got.shape)}"
        )
    wrong = (got != expected).flatten(1).any(1).nonzero().flatten().tolist()
    if wrong:
        raise WrongAnswer(f"{what}: {len(wrong)} of {len(got)} rows differ, the first is row {wrong[0]}")


def must_be_near(what: str, got: Tensor, expected: Tensor, *, relative: float, absolute: Tensor | float) -> None:
    """Check that ``|got - expected| <= relative * |expected| + absolute`` everywhere.

    Raises:
        WrongAnswer: names ``what`` and by how much the worst element is outside.
    """
    if got.shape != expected.shape:
        raise WrongAnswer(f"{what}: expected {list(expected.shape)}, got {list(got.shape)}")
    excess = (got - expected).abs() - relative * expected.abs() - absolute
    if not bool((excess <= 0).all()):
        raise WrongAnswer(f"{what}: outside the bound by up to {float(excess.max()):.3g} (or NaN)")
