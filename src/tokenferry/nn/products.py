"""Products of rows, grouped by expert, with the weights of all experts at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor


def grouped_product(ends: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Return ``[n, O]`` for bfloat16 rows ``[n, I]`` and weights ``[L, I, O]``; ``ends`` ``[L]`` int32. Differentiable.

    Nothing waits for the device. Rows from the last end on hold no data, nor does the result there.
    """
    product: Tensor = F.grouped_mm(rows.contiguous(), weights.contiguous(), offs=ends)
    return with_contiguous_gradient(product)


def with_contiguous_gradient(x: Tensor) -> Tensor:
    """Return ``x``; grouped products refuse gradients with strides of 0, as those of a sum have."""
    out: Tensor = _ContiguousGradient.apply(x)  # type: ignore[no-untyped-call]
    return out


class _ContiguousGradient(torch.autograd.Function):
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
