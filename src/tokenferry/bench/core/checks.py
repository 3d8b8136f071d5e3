"""Comparisons of results with expected results; nothing is timed before they pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.bench.core.device import gather
from tokenferry.bench.core.inputs import Inputs, Sizes, draw_all, expert, sent_to
from tokenferry.types import Quantized


class WrongAnswer(RuntimeError):  # noqa: N818 - reads as what happened
    """A call returned a wrong result; no time is printed for it."""


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


def worst_differences(
    pg: dist.ProcessGroup, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the norm of the difference of two tensors over the norm of the expected one, by name. Collective.

    Args:
        pg: The ranks; each has tensors of its own.
        found: Tensors of a model, such as its loss and gradients.
        expected: The same of the model that it is compared with.

    Returns:
        dict: Of each name that of the worst rank; NaN or infinite where nothing but 0 was expected.
    """
    differences = [_difference(found[what], right) for what, right in expected.items()]
    return dict(zip(expected, map(max, zip(*gather(pg, differences), strict=True)), strict=True))


def _difference(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def changed_bits(pg: dist.ProcessGroup, once: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors of which any bit differs on any rank. Collective."""
    mine = [
        what for what, left in once.items() if not same_bits(left.flatten()[None], again[what].flatten()[None]).all()
    ]
    everywhere = {what for changed in gather(pg, mine) for what in changed}
    return [what for what in once if what in everywhere]


def raise_together(pg: dist.ProcessGroup, errors: Sequence[str]) -> None:
    """Raise on every rank if any rank has errors, so that none goes on alone. Collective.

    Raises:
        WrongAnswer: holds the first errors, in rank order.
    """
    everywhere = [error for errors_of_rank in gather(pg, list(errors)) for error in errors_of_rank]
    if everywhere:
        raise WrongAnswer("; ".join(everywhere[:3]))


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Return ``[rows]`` bool: whether all bytes of a row are the same."""
    return (a.contiguous().view(torch.uint8) == b.contiguous().view(torch.uint8)).flatten(1).all(1)


def as_tensor(x: Tensor | Quantized) -> Tensor:
    """Return rows that have to be a plain tensor.

    Raises:
        WrongAnswer: they are not.
    """
    if not isinstance(x, Tensor):
        raise WrongAnswer(f"expected rows as a Tensor, got {type(x).__name__}")
    return x


def check_rows(what: str, sizes: Sizes, variant: int, rank: int, got: Tensor | Quantized) -> None:
    """Check rows in the layout ROWS: every bit, by source rank, then token.

    Args:
        what: The call, for the message.
        sizes: Sizes of the case.
        variant: The set of inputs.
        rank: The receiver.
        got: ``[N, H]`` bfloat16 rows, which have to be those of `Inputs.x`, or FP8 rows and scales of
            `Inputs.quantized`.

    Raises:
        WrongAnswer: names what differs.
    """
    tensors = _parts(got)
    begin = 0
    for source, inputs in enumerate(draw_all(sizes, variant, tensors[0].device)):
        received = sent_to(sizes, inputs.topk_idx)[:, rank].nonzero().flatten()
        end = begin + len(received)
        for tensor, sent in zip(tensors, _parts(inputs.quantized if len(tensors) > 1 else inputs.x), strict=True):
            if len(tensor) < end:
                raise WrongAnswer(f"{what}: rank {rank} has {len(tensor)} rows, {end} or more were sent to it")
            wrong = int((~same_bits(tensor[begin:end], sent[received])).sum())
            if wrong:
                raise WrongAnswer(
                    f"{what}: {wrong} of {len(received)} rows from rank {source} are wrong on rank {rank}"
                )
        begin = end
    if any(len(tensor) != begin for tensor in tensors):
        raise WrongAnswer(f"{what}: rank {rank} has {len(tensors[0])} rows, {begin} were sent to it")


def _parts(rows: Tensor | Quantized) -> list[Tensor]:
    """Return the tensors of rows; FP8 numbers as bytes, which every device can index."""
    return [rows] if isinstance(rows, Tensor) else [rows.data.view(torch.uint8), rows.scale]


def check_by_expert(what: str, sizes: Sizes, variant: int, rank: int, groups: list[Tensor]) -> None:
    """Check bfloat16 rows of each local expert of a rank: every bit, by source rank, then token.

    Raises:
        WrongAnswer: names what differs.
    """
    first = rank * sizes.local_experts
    expected: list[list[Tensor]] = [[] for _ in groups]
    for inputs in draw_all(sizes, variant, groups[0].device):
        for e, rows in enumerate(expected):
            rows.append(inputs.x[(inputs.topk_idx == first + e).any(1)])
    for e, (got, rows) in enumerate(zip(groups, expected, strict=True)):
        wanted = torch.cat(rows)
        if got.shape != wanted.shape or not bool(same_bits(got, wanted).all()):
            raise WrongAnswer(f"{what}: rows of expert {first + e} are wrong on rank {rank}")


def expected_sums(sizes: Sizes, inputs: Inputs) -> Tensor:
    """Return the sums of combine if rank r answers ``expert(row, r)``: float32, in rank order, rounded once.

    Returns:
        Tensor: ``[T, H]`` bfloat16.
    """
    total = torch.zeros(inputs.x.shape, device=inputs.x.device, dtype=torch.float32)
    for rank, sent in enumerate(sent_to(sizes, inputs.topk_idx).unbind(1)):
        tokens = sent.nonzero().flatten()
        total[tokens] += expert(inputs.x[tokens], rank).float()
    return total.bfloat16()
