"""Products of rows, which are grouped by expert, with the weights of the experts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from tokenferry.errors import ShapeError
from tokenferry.nn import fp8_products
from tokenferry.nn.products import grouped_product

Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A product of rows ``[n, I]`` with the weights of one expert ``[I, O]``, or of each of them ``[L, I, O]``."""

Formula: TypeAlias = Callable[..., Tensor]
"""``formula(product, rows, *weights)``: what an expert computes, with ``product(rows, weight)`` for each product."""

_ALIGNMENT = 8
"""Elements of which the rows of all operands of a grouped product must be a multiple: 16 bytes."""


def by_expert(formula: Formula, rows: Tensor, offsets: Tensor, *weights: Tensor, fp8: bool = False) -> Tensor:
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
        fp8: Cast rows and weights to FP8 for each product, with a scale for each row and each column of a weight; see
            `tokenferry.nn.fp8_products`. Gradients are those of products without it. On GPUs of compute capability 9.0
            (H100, H200) products of bfloat16 are then grouped if all I and O are multiples of 16. Elsewhere experts
            are taken one after the other.

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
            advice = "stack one matrix for each expert"
            if hasattr(weight, "to_local"):
                advice = (
                    "a MoELayer gives its experts their part of that in forward, but not what a checkpoint inside of "
                    "them repeats in backward: checkpoint the layer, or use LayerOptions(checkpoint_experts=True)"
                )
            raise ShapeError(
                f"by_expert: weights[{i}]: expected [L, I, O] with L={offsets.shape[0] - 1} from the offsets, got "
                f"{list(weight.shape)}; {advice}"
            )
    if _have_grouped_product(rows, weights, fp8=fp8):
        ends = offsets[1:].to(torch.int32)
        return formula(partial(fp8_products.grouped_product if fp8 else grouped_product, ends), rows, *weights)
    product = fp8_products.product if fp8 else torch.matmul
    starts = offsets.tolist()
    sizes = [end - start for start, end in itertools.pairwise(starts)]
    # Apply it for experts without rows, too: ranks must build the same graph, and gradients must be 0, not None.
    parts = torch.split(rows, [*sizes, rows.shape[0] - starts[-1]])
    results = [formula(product, part, *one) for part, *one in zip(parts[:-1], *weights, strict=True)]
    return torch.cat([*results, results[0].new_zeros(parts[-1].shape[0], results[0].shape[1])])


def _have_grouped_product(rows: Tensor, weights: tuple[Tensor, ...], *, fp8: bool) -> bool:
    if rows.device.type not in ("cpu", "cuda") or any(one.dtype != torch.bfloat16 for one in (rows, *weights)):
        return False
    if not torch.compiler.is_compiling() and rows.shape[0] == 0:
        return False  # not a case to rely on in kernels
    if fp8 and not fp8_products.can_group(rows, weights):
        return False
    return all(size % _ALIGNMENT == 0 for weight in weights for size in weight.shape[1:])
