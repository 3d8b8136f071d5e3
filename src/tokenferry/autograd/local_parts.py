"""What a rank holds of a DTensor, for products: differentiable any number of times, also with the oldest torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_TO_LOCAL_ONCE = torch.__version__.startswith("2.11.")
"""Whether the gradient of ``DTensor.to_local()`` is not differentiable, as in the oldest torch that is supported."""


def trained_part(parameter: Any) -> Tensor:  # noqa: ANN401 - a DTensor
    """Return what this rank holds of a DTensor, for products; differentiable any number of times.

    This is ``to_local()``, except in torch 2.11, where its gradient is not differentiable: second derivatives would
    silently lack the terms of the experts' weights. Compiled code has no second derivatives anyway. Without gradients
    ``to_local()`` works inside of a transform of torch.func, where a Function does not.
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

        # The gradient of a sum is the gradient of each of its addends.
        placements = [Replicate() if each.is_partial() else each for each in ctx.placements]
        whole = DTensor.from_local(grad, ctx.mesh, placements, run_check=False)
        if whole.shape == ctx.shape:
            return whole
        # Ranks hold different numbers of rows. The strides have to be those of the gradient, which may be a transpose.
        stride = torch.empty(ctx.shape, dtype=grad.dtype, device="meta").stride()
        rows = grad.contiguous()
        return DTensor.from_local(rows, ctx.mesh, placements, run_check=False, shape=ctx.shape, stride=stride)
