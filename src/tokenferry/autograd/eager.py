"""Dispatch, redispatch and combine with gradients, where nothing traces: functions of autograd over plain calls.

The operators of `tokenferry.autograd.ops` do the same where a compiler can see them, and take the host several times as
long. Both make the same calls in the same order, forward and backward, so ranks may differ in which of them they use:
but not inside of ``checkpoint(use_reentrant=False)``, where only operators let forward be repeated before their first
call of backward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from tokenferry.api import ExpertGroup
from tokenferry.autograd import ops
from tokenferry.autograd.common import (
    carriers,
    for_weights,
    own_weights,
    refuse_transformed,
    zero_empty_rows,
    zeroing,
)
from tokenferry.formats import fp8
from tokenferry.types import Dispatched, DispatchOptions, Layout, Plan, Quantized, Routing, Scale

_num_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_num_pre_dispatch_modes: Callable[[], int] = torch._ops._len_torch_dispatch_stack_pre_dispatch
_is_transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active
_PLAIN = (Tensor, torch.nn.Parameter)


def is_traced(*tensors: Tensor | None) -> bool:
    """Return whether something has to see operators: a compiler, a mode or transform of torch, a subclass of Tensor."""
    if torch.compiler.is_compiling():
        return True
    if _num_dispatch_modes() or _num_pre_dispatch_modes() or _is_transformed():
        return True
    return any(tensor is not None and type(tensor) not in _PLAIN for tensor in tensors)


def _is_recorded(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """What a dispatch or redispatch has brought.

    Attributes:
        rows: The rows.
        weights: The weights, if any were sent.
        whole: All of it, as it came.
    """

    rows: Tensor | Quantized
    weights: Tensor | None
    whole: Dispatched[Any]

    def kept(self) -> Sent:
        """Return a copy outside of the heap: experts keep rows until backward, all of which the heap cannot hold."""
        rows = self.rows
        if isinstance(rows, Quantized):
            rows = Quantized(rows.data.clone(), rows.scale.clone())
        elif rows is self.whole.x:  # otherwise they were computed from the rows that came, and are outside of the heap
            rows = rows.clone()
        return Sent(rows, None if self.weights is None else self.weights.clone(), self.whole)


class Calls(ABC):
    """The calls with gradients, made from abstract calls without gradients."""

    __slots__ = ()

    @abstractmethod
    def plain_dispatch(
        self, options: DispatchOptions, x: Tensor | Quantized, topk_idx: Tensor, topk_weights: Tensor | None
    ) -> Sent:
        """Send rows without gradients."""

    @abstractmethod
    def plain_redispatch(self, plan: Plan, x: Tensor | Quantized, topk_weights: Tensor | None) -> Sent:
        """Send rows along a plan without gradients."""

    @abstractmethod
    def plain_combine(
        self, plan: Plan, y: Tensor, weights: Tensor | None, *biases: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Add rows and weights up without gradients."""

    @abstractmethod
    def for_weights(self) -> Calls:
        """Return the same for the narrow rows of `common.carriers`."""

    def dispatch(
        self, options: DispatchOptions, x: Tensor | Quantized, topk_idx: Tensor, topk_weights: Tensor | None
    ) -> Sent:
        """Send rows."""
        if not _is_recorded(None if isinstance(x, Quantized) else x, topk_weights):
            return self.plain_dispatch(options, x, topk_idx, topk_weights)
        rows, weights, sent = _dispatch(self, options, x, topk_idx, topk_weights)
        return Sent(sent.rows if rows is None else rows, weights, sent.whole)

    def redispatch(self, plan: Plan, x: Tensor | Quantized, topk_weights: Tensor | None) -> Sent:
        """Send rows along a plan."""
        if not _is_recorded(None if isinstance(x, Quantized) else x, topk_weights):
            return self.plain_redispatch(plan, x, topk_weights)
        rows, weights, sent = _redispatch(self, plan, x, topk_weights)
        return Sent(sent.rows if rows is None else rows, weights, sent.whole)

    def combine(self, plan: Plan, y: Tensor, weights: Tensor | None, *biases: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add rows and weights up."""
        if not _is_recorded(y, weights, *biases):
            return self.plain_combine(plan, y, weights, *biases)
        return _combine(self, plan, y, weights, *biases)

    def redispatch_gradients(self, plan: Plan, x: Tensor, topk_weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Send gradients of rows and weights along a plan."""
        sent = self.redispatch(plan, x, topk_weights)
        assert isinstance(sent.rows, Tensor)
        return sent.rows, sent.weights

    def combine_gradients(self, plan: Plan, rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Add gradients of rows and weights up."""
        return self.combine(plan, rows, weights)


class _Context(Protocol):
    """What forward keeps for backward. Not as saved tensors, since a plan has many of them."""

    calls: Calls
    plan: Plan
    needs_input_grad: tuple[bool, ...]


class _Dispatch(Function):
    """`Calls.plain_dispatch`; rows without gradients are among the last result only."""

    @staticmethod
    def forward(
        ctx: _Context,
        calls: Calls,
        options: DispatchOptions,
        x: Tensor | Quantized,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Sent]:
        sent = calls.plain_dispatch(options, x, topk_idx, topk_weights).kept()
        ctx.calls, ctx.plan = calls, sent.whole.plan
        return None if isinstance(sent.rows, Quantized) else sent.rows, sent.weights, sent

    @staticmethod
    def backward(ctx: _Context, rows: Tensor | None, weights: Tensor | None, _sent: None) -> tuple[Tensor | None, ...]:
        refuse_transformed(rows, weights)
        _, _, needs_x, _, needs_weights = ctx.needs_input_grad
        x, topk_weights = _gradients_of_sent(ctx, rows if needs_x else None, weights if needs_weights else None)
        return None, None, x, None, topk_weights


class _Redispatch(Function):
    """`Calls.plain_redispatch`."""

    @staticmethod
    def forward(
        ctx: _Context, calls: Calls, plan: Plan, x: Tensor | Quantized, topk_weights: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Sent]:
        ctx.calls, ctx.plan = calls, plan
        sent = calls.plain_redispatch(plan, x, topk_weights).kept()
        return None if isinstance(sent.rows, Quantized) else sent.rows, sent.weights, sent

    @staticmethod
    def backward(ctx: _Context, rows: Tensor | None, weights: Tensor | None, _sent: None) -> tuple[Tensor | None, ...]:
        refuse_transformed(rows, weights)
        _, _, needs_x, needs_weights = ctx.needs_input_grad
        x, topk_weights = _gradients_of_sent(ctx, rows if needs_x else None, weights if needs_weights else None)
        return None, None, x, topk_weights


def _gradients_of_sent(
    ctx: _Context, rows: Tensor | None, weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    calls = ctx.calls
    if weights is not None:
        weights = weights.contiguous()
    if rows is not None:
        return calls.combine_gradients(ctx.plan, rows.contiguous(), weights)
    assert weights is not None
    by_slot = ctx.plan.options.layout is Layout.ROWS
    narrow = carriers(weights, weights.shape[:-1] if by_slot else weights.shape)
    return None, calls.for_weights().combine_gradients(ctx.plan, narrow, weights)[1]


class _Combine(Function):
    """`Calls.plain_combine`."""

    @staticmethod
    def forward(
        ctx: _Context, calls: Calls, plan: Plan, y: Tensor, weights: Tensor | None, *biases: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        ctx.calls, ctx.plan = calls, plan
        return calls.plain_combine(plan, y, weights, *biases)

    @staticmethod
    def backward(ctx: _Context, x: Tensor, topk_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_transformed(x, topk_weights)
        _, _, needs_y, needs_weights, *need_bias = ctx.needs_input_grad
        y = weights = None
        if needs_y or needs_weights:
            calls, rows = ctx.calls, x
            if not needs_y:
                calls, rows = calls.for_weights(), carriers(x, x.shape[:1])
            sent_weights = topk_weights.contiguous() if needs_weights and topk_weights is not None else None
            y, weights = calls.redispatch_gradients(ctx.plan, rows.contiguous(), sent_weights)
        return None, None, y if needs_y else None, weights, *(x if needs else None for needs in need_bias)


_dispatch: Callable[..., tuple[Tensor | None, Tensor | None, Sent]] = _Dispatch.apply
_redispatch: Callable[..., tuple[Tensor | None, Tensor | None, Sent]] = _Redispatch.apply
_combine: Callable[..., tuple[Tensor, Tensor | None]] = _Combine.apply


@dataclass(frozen=True, slots=True, eq=False)
class GroupCalls(Calls):
    """The calls of a group.

    Attributes:
        group: The group; for weights alone a view of it.
        owner: The group whose view it is, to keep that alive.
        quantize: Cast rows to send them, as `tokenferry.autograd.dispatch` says.
    """

    group: ExpertGroup
    owner: ExpertGroup | None = None
    quantize: Scale | None = None

    def plain_dispatch(
        self, options: DispatchOptions, x: Tensor | Quantized, topk_idx: Tensor, topk_weights: Tensor | None
    ) -> Sent:
        """Call `ExpertGroup.dispatch`, with zeroed padding."""
        routing, options = Routing(topk_idx, topk_weights), zeroing(options)
        if self.quantize is None or isinstance(x, Quantized):
            return _padded(self.group.dispatch(x, routing, options=options))
        sent = self.group.dispatch(fp8.cast(x, self.quantize), routing, options=options)
        rows = fp8.dequantize(sent.x).to(x.dtype)
        zero_empty_rows(sent.plan, rows, sent.topk_weights)
        return Sent(rows, sent.topk_weights, sent)

    def plain_redispatch(self, plan: Plan, x: Tensor | Quantized, topk_weights: Tensor | None) -> Sent:
        """Call `ExpertGroup.redispatch`, with zeroed padding."""
        options = zeroing(plan.options)
        if options != plan.options:
            plan = replace(plan, options=options)
        return _padded(self.group.redispatch(x, plan, topk_weights=topk_weights))

    def plain_combine(
        self, plan: Plan, y: Tensor, weights: Tensor | None, *biases: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Call `ExpertGroup.combine`; ROWS: without the weights in slots of other ranks' experts."""
        weights = own_weights(weights, plan)
        sums = self.group.combine(y, plan, topk_weights=weights, bias=biases or None)
        return sums.x, sums.topk_weights

    def for_weights(self) -> GroupCalls:
        """Return the calls of a view that the group keeps."""
        return GroupCalls(for_weights(self.group), self.owner or self.group)

    def redispatch_gradients(self, plan: Plan, x: Tensor, topk_weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As that of `Calls`, by an operator if backward is traced."""
        if not is_traced(x, topk_weights):
            return Calls.redispatch_gradients(self, plan, x, topk_weights)
        rows, _, weights, *_ = ops.redispatch_along(self.group, plan, x, None, topk_weights)
        return rows, None if topk_weights is None else weights

    def combine_gradients(self, plan: Plan, rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As that of `Calls`, by an operator if backward is traced."""
        if not is_traced(rows, weights):
            return Calls.combine_gradients(self, plan, rows, weights)
        x, topk_weights = ops.combine_along(self.group, plan, rows, weights, ())
        return x, None if weights is None else topk_weights


def _padded(sent: Dispatched[Any]) -> Sent:
    rows = sent.x
    parts = (rows.data, rows.scale) if isinstance(rows, Quantized) else (rows,)
    zero_empty_rows(sent.plan, *parts, sent.topk_weights)
    return Sent(rows, sent.topk_weights, sent)
