"""What operators and functions of autograd have in common: padding is zero, and what travels in backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tokenferry.api import ExpertGroup
from tokenferry.checks import check_not_transformed
from tokenferry.errors import UnsupportedError
from tokenferry.types import DispatchOptions, Layout, Plan

NARROWEST_HIDDEN = 8
"""H of the narrowest rows that can be sent, in bfloat16."""


def zeroing(options: DispatchOptions) -> DispatchOptions:
    """Return the same options with zeroed padding, if the layout has padding."""
    return options if options.layout is Layout.ROWS or options.zero_padding else replace(options, zero_padding=True)


def zero_empty_rows(plan: Plan, *tensors: Tensor | None) -> None:
    """Zero the rows that hold no data and that `DispatchOptions.zero_padding` is not for: those of ROWS."""
    if plan.options.layout is not Layout.ROWS or plan.num_received is not None:
        return
    empty = torch.arange(plan.num_delivered, device=plan.src_counts.device, dtype=torch.int64) >= plan.src_counts.sum()
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            # As bytes, since masked_fill_ does not support every dtype.
            tensor.view(torch.uint8).masked_fill_(empty.unsqueeze(1), 0)


def own_weights(weights: Tensor | None, plan: Plan) -> Tensor | None:
    """Return weights to be combined, ROWS: those in slots of other ranks' experts as 0.

    Dispatch sets these to 0, whatever was sent, so they have no gradient.
    """
    if weights is None or plan.options.layout is not Layout.ROWS or weights.shape != plan.topk_idx.shape:
        return weights
    return weights.masked_fill(plan.topk_idx < 0, 0.0)


def carriers(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the narrowest rows that can be sent, for gradients of weights without rows."""
    return like.new_zeros(*shape, NARROWEST_HIDDEN, dtype=torch.bfloat16)


def for_weights(group: ExpertGroup) -> ExpertGroup:
    """Return a view of a group for the rows of `carriers`, made once. Local.

    Unlike others it does not keep the group alive, since the group has it, and a cycle would free both too late.
    """
    if group.shape.hidden == NARROWEST_HIDDEN:
        return group
    narrow = group._narrow
    if narrow is None:
        narrow = group._narrow = group.for_shape(replace(group.shape, hidden=NARROWEST_HIDDEN))
        narrow._origin = None
    return narrow


def refuse_transformed(*gradients: Tensor | None) -> None:
    """Raise for gradients that stand for many, or have a tangent, before anything is sent: a call sends one, alone.

    Raises:
        UnsupportedError: they stand for many.
        ArgumentError: one has a tangent.
    """
    is_batched, is_legacy = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
    for gradient in gradients:
        if gradient is None:
            continue
        if is_batched(gradient) or is_legacy(gradient):
            raise UnsupportedError(
                "autograd: gradients of several backward passes at once, as of vmap, is_grads_batched=True or "
                "vectorize=True, cannot be sent; make the passes one after another"
            )
        if forward_ad._current_level >= 0:
            check_not_transformed("backward", "gradient", gradient)
