"""What a rank holds of a DTensor, for products: differentiable any number of times, also with the oldest torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_TO_LOCAL_ONCE = torch.__version__.startswith("2.11.")
"""Whether the gradient of ``DTensor.to_local()`` has none itself, as is so in the oldest torch that we know."""


def trained_part(parameter: Any) -> Tensor:  # noqa: ANN401 - a DTensor
    """Return what this rank holds of a DTensor, for products; differentiable any number of times.

    That is ``to_local()``, but for torch 2.11, whose gradient of it has none itself: second derivatives would lack what
    comes of the weights of experts, without a word where they have other parts. Compiled code has none anyway, and
    where no gradients are made ``to_local()`` may stand inside of a transform of torch.func, which a Function may not.
    """
    part: Tensor
    if _TO_LOCAL_ONCE and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        part = _TrainedPart.apply(parameter)  # type: ignore[no-untyped-call]
    else:
        part = parameter.to_local()
    return part


class _TrainedPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Any) -> Tensor:  # noqa: ANN401 - torch's
        ctx.mesh, ctx.placements, ctx.shape = whole.device_mesh, whole.placements, whole.shape
        part: Tensor = whole.to_local()
        return part.view_as(part)  # the parameter's own tensor must not become a result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # noqa: ANN401 - a DTensor
        from torch.distributed.tensor import DTensor, Replicate

        # Of each addend of a sum the gradient is the whole one.
        placements = [Replicate() if each.is_partial() else each for each in ctx.placements]
        whole = DTensor.from_local(grad, ctx.mesh, placements, run_check=False)
        if whole.shape == ctx.shape:
            return whole
        # Ranks hold different numbers of rows. The strides have to be those of the gradient, which may be a transpose.
        stride = torch.empty(ctx.shape, dtype=grad.dtype, device="meta").stride()
        rows = grad.contiguous()
        return DTensor.from_local(rows, ctx.mesh, placements, run_check=False, shape=ctx.shape, stride=stride)
