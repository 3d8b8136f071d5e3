"""Products in FP8: rows and weights are cast to float8_e4m3fn, with a scale for each row and each column of a weight.

``scale = max(amax, 2^-100) / 448`` and ``q = e4m3(x / scale)``, in float32; amax is the largest magnitude along the
dimension that is summed. ``y = (q_rows @ q_weight) * scale_rows * scale_weight``, summed and scaled in float32, rounded
to the dtype of the rows. A NaN or an infinity makes its row, or its column, NaN. Gradients are those of
``rows @ weight`` at the operands before the cast, as if the cast were the identity.

GPUs of compute capability 9.0 multiply FP8 rows by `torch._scaled_grouped_mm`, and others that have FP8 by
`torch._scaled_mm`: bfloat16 operands whose I and O are multiples of 16. Elsewhere the same FP8 numbers are multiplied
in float32: slower than a product without FP8, and equal but for the order of sums.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from tokenferry.nn.precision import product as exact_product
from tokenferry.nn.precision import without_autocast
from tokenferry.nn.products import with_contiguous_gradient

_MAX = 448.0
_MIN_AMAX = 2.0**-100
_ALIGNMENT = 16
"""Elements of which rows of FP8 operands must be a multiple: 16 bytes."""
_GROUPED = ((9, 0),)
_PLAIN = ((8, 9), (9, 0), (10, 0), (12, 0))
"""Compute capabilities for which torch has such products."""


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """Return ``[n, O]`` for rows ``[n, I]`` and the weight of one expert ``[I, O]``. Local, differentiable."""
    out: Tensor = _Product.apply(rows, weight)  # type: ignore[no-untyped-call]
    return out


def grouped_product(ends: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Return ``[n, O]`` for rows ``[n, I]`` and weights ``[L, I, O]``; ``ends`` ``[L]`` int32. Local, differentiable.

    Nothing waits for the device. Rows from the last end on hold no data, nor does the result there.
    """
    out: Tensor = _GroupedProduct.apply(rows, weights, ends)  # type: ignore[no-untyped-call]
    return out


def can_group(rows: Tensor, weights: tuple[Tensor, ...]) -> bool:
    """Return whether `grouped_product` can be used on this GPU, with all of these weights."""
    return hasattr(torch, "_scaled_grouped_mm") and _has_fp8(_GROUPED, rows, weights)


def _has_fp8(capabilities: tuple[tuple[int, int], ...], rows: Tensor, weights: tuple[Tensor, ...]) -> bool:
    if any(one.dtype != torch.bfloat16 for one in (rows, *weights)):
        return False
    if any(size % _ALIGNMENT for weight in weights for size in weight.shape[-2:]):
        return False
    return _capability(rows.device) in capabilities


def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of an NVIDIA GPU; zeros for other devices."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


# What `torch.compiler.assume_constant_result` does, without importing the compiler.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _cast(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``[..., I]`` in FP8, contiguous, and its scales ``[...]`` float32."""
    x = x.float()
    amax = x.abs().amax(dim=-1).clamp_(min=_MIN_AMAX)
    # Divide by tensors: on GPUs, torch divides by a number by multiplying with its rounded reciprocal.
    scale = amax / torch.full_like(amax, _MAX)
    return (x / scale.unsqueeze(-1)).to(torch.float8_e4m3fn).contiguous(), scale


class _Context(Protocol):
    """The state that forward saves for backward."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, weight: Tensor) -> Tensor:
        q_rows, scale = _cast(rows)
        q_weight, weight_scale = _cast(weight.mT)
        if rows.shape[0] and _has_fp8(_PLAIN, rows, (weight,)):
            scales = (scale.unsqueeze(1), weight_scale.unsqueeze(0))
            return torch._scaled_mm(q_rows, q_weight.mT, *scales, out_dtype=rows.dtype)
        with without_autocast(rows.device.type):
            return (q_rows.float() @ q_weight.float().mT * scale.unsqueeze(1) * weight_scale).to(rows.dtype)

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        for_rows, for_weight = ctx.needs_input_grad
        return (
            exact_product(grad, weight.mT) if for_rows else None,
            exact_product(rows.mT, grad) if for_weight else None,
        )


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        q_rows, scale = _cast(rows)
        q_weights, weight_scale = _cast(weights.mT)
        return torch._scaled_grouped_mm(q_rows, q_weights.mT, scale, weight_scale, offs=ends, out_dtype=rows.dtype)

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights, ends = ctx.saved_tensors
        for_rows, for_weights, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        to_rows = F.grouped_mm(grad, weights.mT, offs=ends) if for_rows else None
        to_weights = F.grouped_mm(rows.mT, grad, offs=ends) if for_weights else None
        return (
            None if to_rows is None else with_contiguous_gradient(to_rows),
            None if to_weights is None else with_contiguous_gradient(to_weights),
            None,
        )
