"""Products of rows, which are grouped by expert, with the weights of the experts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from tokenferry.errors import ShapeError

Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A product of rows ``[n, I]`` with the weights of one expert ``[I, O]``, or of each of them ``[L, I, O]``."""

Formula: TypeAlias = Callable[..., Tensor]
"""``formula(product, rows, *weights)``: what an expert computes, with ``product(rows, weight)`` for each product."""

_ALIGNMENT = 8
"""Elements of which the rows of all operands of a grouped product must be a multiple: 16 bytes."""


def by_expert(formula: Formula, rows: Tensor, offsets: Tensor, *weights: Tensor) -> Tensor:
    """Apply the formula of an expert to the rows of each expert, with its weights.

    Where torch has a grouped product (`torch.nn.functional.grouped_mm`) for them, the formula is applied once to all
    rows, with grouped products; nothing waits for the device. Otherwise it is applied to one expert after the other.
    That is so for all dtypes but bfloat16, for which alone torch compiles grouped products and has kernels on GPUs, and
    for weights with an I or O that is no multiple of 8. It reads the offsets on the host: on a GPU that waits.

    Contract: local; differentiable, in rows and weights, any number of times.

    Args:
        formula: ``formula(product, rows, *weights)`` returns a row for each row. It may compute anything that treats
            rows separately; each product of rows and a weight has to be ``product(rows, weight)``.
        rows: ``[n, I]``, grouped by expert.
        offsets: ``[L + 1]`` integers: the first row of each expert, then the end. Rows from there on hold no data, nor
            does the result.
        *weights: ``[L, I, O]`` each: those of all experts, of which the formula gets those of one, or all.

    Returns:
        Tensor: ``[n, O]``.

    Raises:
        ShapeError: a weight is not ``[L, I, O]``.

    Example:
        >>> import torch
        >>> from tokenferry.nn import by_expert
        >>> rows, weights = torch.ones(3, 4), torch.stack([torch.eye(4), 2 * torch.eye(4)])
        >>> by_expert(lambda product, x, w: product(x, w).relu(), rows, torch.tensor([0, 1, 3]), weights)[:, 0]
        tensor([1., 2., 2.])
    """
    for i, weight in enumerate(weights):
        if weight.ndim != 3 or weight.shape[0] != offsets.shape[0] - 1:
            raise ShapeError(
                f"by_expert: weights[{i}]: expected [L, I, O] with L={offsets.shape[0] - 1} from the offsets, got "
                f"{list(weight.shape)}; stack one matrix for each expert"
            )
    if _have_grouped_product(rows, weights):
        ends = offsets[1:].to(torch.int32)
        return formula(partial(_grouped_product, ends), rows, *weights)
    starts = offsets.tolist()
    sizes = [end - start for start, end in itertools.pairwise(starts)]
    # Apply it for experts without rows, too: ranks must build the same graph, and gradients must be 0, not None.
    parts = torch.split(rows, [*sizes, rows.shape[0] - starts[-1]])
    results = [formula(torch.matmul, part, *one) for part, *one in zip(parts[:-1], *weights, strict=True)]
    return torch.cat([*results, results[0].new_zeros(parts[-1].shape[0], results[0].shape[1])])


def _have_grouped_product(rows: Tensor, weights: tuple[Tensor, ...]) -> bool:
    if rows.device.type not in ("cpu", "cuda") or any(one.dtype != torch.bfloat16 for one in (rows, *weights)):
        return False
    if not torch.compiler.is_compiling() and rows.shape[0] == 0:
        return False  # not a case to rely on in kernels
    return all(size % _ALIGNMENT == 0 for weight in weights for size in weight.shape[1:])


def _grouped_product(ends: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    product: Tensor = F.grouped_mm(rows.contiguous(), weights.contiguous(), offs=ends)
    return _ContiguousGradient.apply(product)  # type: ignore[no-any-return, no-untyped-call]


class _ContiguousGradient(torch.autograd.Function):
    """The identity; grouped products refuse gradients with strides of 0, as those of a sum have."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad.contiguous()
