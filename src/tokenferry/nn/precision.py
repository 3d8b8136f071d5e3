"""What torch.autocast changes in a layer, and what it does not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)
"""Dtypes narrower than float32 in which models compute."""
_NEVER = "meta"
"""The device without autocast. Torch can be asked, but `torch.compile` of torch 2.11 ends a graph where it is."""


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype in which torch.autocast computes products; None if it is off."""
    if device_type == _NEVER or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of two matrices in their own dtype, even if forward or backward runs under torch.autocast."""
    out: Tensor = _Product.apply(a, b)  # type: ignore[no-untyped-call]
    return out


class _Context(Protocol):
    """The state that forward saves for backward."""

    saved_tensors: tuple[Tensor, Tensor]
    needs_input_grad: tuple[bool, bool]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with without_autocast(a.device.type):
            return a @ b

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        for_a, for_b = ctx.needs_input_grad
        return product(grad, b.mT) if for_a else None, product(a.mT, grad) if for_b else None


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return a context in which products have the dtype of their operands."""
    if device_type == _NEVER:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
