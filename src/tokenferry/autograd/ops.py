"""The torch.library ops behind `tokenferry.autograd`: ``tokenferry::dispatch``, ``::redispatch`` and ``::combine``.

Ops take and return only tensors, ints and strings. A group is therefore passed as its key, a plan as its eight tensors
plus what the host knows of it as a ninth, and everything else as one string and one list of ints:

``where``  ``"<group key> <plan key> <layout> <counts>"``; in dispatch, if rows are cast, also ``" <scale>"``
``sizes``  E, K, H, M, most nodes (0: any), A, capacity (0: none), T, delivered rows (the last two are 0 in dispatch,
           which has no plan yet)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenferry.api import ExpertGroup, find_group
from tokenferry.autograd import common
from tokenferry.autograd.common import NARROWEST_HIDDEN, carriers, own_weights, zero_empty_rows, zeroing
from tokenferry.autograd.generated_code import keep_order
from tokenferry.autograd.sums import sum_over
from tokenferry.formats import fp8
from tokenferry.layout import row_capacity
from tokenferry.types import (
    CountsLocation,
    Dispatched,
    DispatchOptions,
    Layout,
    MoeShape,
    Plan,
    Quantized,
    Routing,
    Scale,
)

_PLAN_TENSORS = 9


class _Context(Protocol):
    """The state that forward saves for backward."""

    where: str
    sizes: Sequence[int]
    group: ExpertGroup
    num_biases: int
    needs_input_grad: tuple[Any, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


def pack(
    group: ExpertGroup, plan_key: str, options: DispatchOptions, num_tokens: int, num_delivered: int
) -> tuple[str, list[int]]:
    """Return ``where`` and ``sizes``; see the top of this module."""
    shape = group.shape
    where = f"{group.key} {plan_key} {options.layout.value} {options.counts}"
    sizes = [shape.num_experts, shape.top_k, shape.hidden, shape.max_tokens, shape.max_nodes or 0]
    return where, [*sizes, options.alignment, options.capacity or 0, num_tokens, num_delivered]


def _group(where: str, sizes: Sequence[int]) -> ExpertGroup:
    # int(): while a graph is being traced, sizes may be symbolic; these five become constants of the graph. The sixth,
    # node_slots, is for decode calls, which have no gradients.
    num_experts, top_k, hidden, max_tokens, max_nodes = map(int, sizes[:5])
    return find_group(where.split()[0], MoeShape(num_experts, top_k, hidden, max_tokens, max_nodes or None))


def _unpack(where: str, sizes: Sequence[int]) -> tuple[ExpertGroup, DispatchOptions]:
    _, _, layout, location = where.split()[:4]
    counts: CountsLocation = "device" if location == "device" else "host"
    options = DispatchOptions(Layout(layout), alignment=int(sizes[5]), counts=counts, capacity=int(sizes[6]) or None)
    return _group(where, sizes), zeroing(options)


def with_cast(where: str, quantize: Scale | None) -> str:
    """Return ``where`` of a dispatch that casts its rows."""
    return where if quantize is None else f"{where} {quantize.value}"


def _quantize(where: str) -> Scale | None:
    words = where.split()
    return Scale(words[4]) if len(words) > 4 else None


def _cast_back(sent: Dispatched[Any], dtype: torch.dtype) -> Dispatched[Any]:
    return replace(sent, x=fp8.dequantize(sent.x).to(dtype))


def tensors_of(plan: Plan) -> list[Tensor]:
    """Return the eight tensors of a plan in the order of its fields, then what the host knows of it."""
    return [
        plan.dst_token,
        plan.dst_counts,
        plan.src_token,
        plan.src_counts,
        plan.topk_idx,
        plan.row_idx,
        plan.expert_counts,
        plan._places,
        _host_ints(plan._host_counts, plan),
    ]


def plan_of(tensors: Sequence[Tensor], key: str, options: DispatchOptions, num_tokens: int, num_delivered: int) -> Plan:
    """Return the plan made of tensors that an op takes or returns; the inverse of `tensors_of`."""
    dst_token, dst_counts, src_token, src_counts, topk_idx, row_idx, expert_counts, places, host_ints = tensors
    known, num_counts = ints_of(host_ints) or (), num_host_counts(options, expert_counts.shape[0])
    return Plan(
        group_key=key,
        options=options,
        num_tokens=num_tokens,
        num_received=None if options.counts == "device" else src_token.shape[0],
        num_delivered=num_delivered,
        dst_token=dst_token,
        dst_counts=dst_counts,
        src_token=src_token,
        src_counts=src_counts,
        topk_idx=topk_idx,
        row_idx=row_idx,
        expert_counts=expert_counts,
        _places=places,
        _host_counts=known[:num_counts] or None,
        _host_sizes=known[num_counts:] or None,
    )


def _host_ints(host_counts: tuple[int, ...] | None, plan: Plan) -> Tensor:
    """Return what the host knows of a plan: its host counts, then its host sizes; empty where it does not."""
    return torch.tensor((*(host_counts or ()), *(plan._host_sizes or ())), dtype=torch.int64, device="cpu")


def num_host_counts(options: DispatchOptions, num_local: int) -> int:
    """Return how many of the numbers that the host knows of a plan are its host counts."""
    return num_local if options.counts == "host" else 0


def ints_of(host_ints: Tensor) -> tuple[int, ...] | None:
    """Return the values of a tensor of the host; None if they are unknown or a graph is being traced."""
    # Neither a traced tensor nor a subclass such as FakeTensor has values.
    if torch.compiler.is_compiling() or type(host_ints) is not Tensor:
        return None
    return tuple(host_ints.tolist()) or None


def _unpack_plan(where: str, sizes: Sequence[int], tensors: Sequence[Tensor]) -> tuple[ExpertGroup, Plan]:
    group, options = _unpack(where, sizes)
    return group, plan_of(tensors, where.split()[1], options, sizes[7], sizes[8])


def num_rows(rows: Tensor) -> int:
    """Return ``Plan.num_delivered`` for received rows in any layout."""
    return rows.shape[0] if rows.ndim == 2 else rows.shape[0] * rows.shape[1]


def _parts(sent: Dispatched[Tensor | Quantized]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return rows, scale, weights, what the host knows and offsets; absent ones are empty: ops cannot return None."""
    rows, scale = (sent.x.data, sent.x.scale) if isinstance(sent.x, Quantized) else (sent.x, sent.x.new_empty(0))
    weights = rows.new_empty(0, dtype=torch.float32) if sent.topk_weights is None else sent.topk_weights
    offsets = sent.expert_counts.new_empty(0) if sent.expert_offsets is None else sent.expert_offsets
    zero_empty_rows(sent.plan, rows, scale, weights)
    return rows, scale, weights, _host_ints(sent.host_counts, sent.plan), offsets


def _apart(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Give each tensor a storage of its own that starts with it, as torch requires and the fakes have.

    A backend may return several views of one block. Only a tensor that is not contiguous is copied: the others get a
    second storage over the same memory, which keeps the first one alive.
    """
    seen: set[int] = set()
    apart = []
    for tensor in tensors:
        storage = tensor.untyped_storage()._cdata
        if not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        elif tensor.storage_offset() or storage in seen:
            # As bytes, which every version of torch can put into a DLPack capsule.
            flat = torch._C._from_dlpack(torch._C._to_dlpack(tensor.reshape(-1).view(torch.uint8)))
            tensor = flat.view(tensor.dtype).view(tensor.shape)
        seen.add(storage)
        apart.append(tensor)
    return tuple(apart)


# ---------------------------------------------------------------------- dispatch


@torch.library.custom_op(
    "tokenferry::dispatch",
    mutates_args=(),
    schema="(Tensor x, Tensor? scale, Tensor topk_idx, Tensor? topk_weights, str where, SymInt[] sizes) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def dispatch(
    x: Tensor, scale: Tensor | None, topk_idx: Tensor, topk_weights: Tensor | None, where: str, sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    """Send rows and make a plan; return the same five results as `redispatch`, then the plan's eight tensors."""
    group, options = _unpack(where, sizes)
    routing, quantize = Routing(topk_idx, topk_weights), _quantize(where)
    sent: Dispatched[Any]
    if quantize is None:
        sent = group.dispatch(x if scale is None else Quantized(x, scale), routing, options=options)
    else:
        sent = _cast_back(group.dispatch(fp8.cast(x, quantize), routing, options=options), x.dtype)
    return _apart((*_parts(sent), *tensors_of(sent.plan)[:-1]))  # without what the host knows, which is among the parts


@dispatch.register_fake
def _dispatch_fake(
    x: Tensor, scale: Tensor | None, topk_idx: Tensor, topk_weights: Tensor | None, where: str, sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    _keep_order()
    group, options = _unpack(where, sizes)
    new_size = torch.library.get_ctx().new_dynamic_size
    num_ranks, num_local, top_k = group.num_ranks, group.num_local_experts, group.shape.top_k
    space = row_capacity(group.shape, options, num_ranks)
    on_host, layout = options.counts == "host", options.layout
    received: int | torch.SymInt = new_size() if on_host else space.received
    sent: int | torch.SymInt = new_size() if on_host else x.shape[0] * space.sent
    if layout is Layout.MASKED:
        delivered: int | torch.SymInt = num_local * space.given
    elif on_host:
        delivered = received if layout is Layout.ROWS else new_size()
    else:
        delivered = space.given
    index = x.new_empty(0, dtype=torch.int64)
    slots = 0 if layout is Layout.ROWS else received
    places, columns = group._places_shape(options, x.shape[0])
    return (
        *_fake_parts(group, _Sent(x, scale, topk_weights), options, delivered, top_k),
        index.new_empty(sent),
        index.new_empty(num_ranks),
        index.new_empty(received),
        index.new_empty(num_ranks),
        topk_idx.new_empty(received, top_k),
        index.new_empty(slots, top_k),
        index.new_empty(num_local, dtype=torch.int32),
        index.new_empty(new_size() if places is None else places, columns, dtype=torch.int32),
    )


@dataclass(frozen=True, slots=True)
class _Sent:
    """The tensors that a rank sends."""

    x: Tensor
    scale: Tensor | None
    weights: Tensor | None


def _fake_parts(
    group: ExpertGroup, sent: _Sent, options: DispatchOptions, delivered: int | torch.SymInt, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, scale, layout, num_local = sent.x, sent.scale, options.layout, group.num_local_experts
    num_ints = num_host_counts(options, num_local) + group._num_host_sizes
    rows = (num_local, delivered // num_local) if layout is Layout.MASKED else (delivered,)
    weights = (0,) if sent.weights is None else (*rows, top_k) if layout is Layout.ROWS else rows
    return (
        x.new_empty(*rows, x.shape[1]),
        x.new_empty(0) if scale is None else scale.new_empty(*rows, scale.shape[1]),
        x.new_empty(weights, dtype=torch.float32),
        torch.empty(num_ints, dtype=torch.int64, device="cpu"),
        x.new_empty(num_local + 1 if layout is Layout.EXPERTS else 0, dtype=torch.int32),
    )


def _dispatch_setup(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, scale, _, _, where, sizes = inputs
    _save(ctx, (*output[5:], output[3]), where, [*sizes[:7], x.shape[0], num_rows(output[0])])
    if scale is not None:
        ctx.mark_non_differentiable(*output[:2])


def _dispatch_backward(
    ctx: _Context, grad_rows: Tensor, _: Tensor, grad_weights: Tensor, *__: Tensor
) -> tuple[Any, ...]:
    needs_x, needs_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    grad_x, grad_topk_weights = _combine_gradients(ctx, grad_rows, grad_weights if needs_weights else None, needs_x)
    return grad_x, None, None, grad_topk_weights, None, None


dispatch.register_autograd(_dispatch_backward, setup_context=_dispatch_setup)


# ---------------------------------------------------------------------- redispatch


@torch.library.custom_op(
    "tokenferry::redispatch",
    mutates_args=(),
    schema="(Tensor x, Tensor? scale, Tensor? topk_weights, Tensor[] plan, str where, SymInt[] sizes) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def redispatch(
    x: Tensor, scale: Tensor | None, topk_weights: Tensor | None, plan: list[Tensor], where: str, sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    """Send rows along a plan; return rows, scale, weights, host counts and offsets, empty if absent."""
    group, full_plan = _unpack_plan(where, sizes, plan)
    sent = group.redispatch(x if scale is None else Quantized(x, scale), full_plan, topk_weights=topk_weights)
    return _apart(_parts(sent))


@redispatch.register_fake
def _redispatch_fake(
    x: Tensor, scale: Tensor | None, topk_weights: Tensor | None, plan: list[Tensor], where: str, sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    _keep_order()
    group, options = _unpack(where, sizes)
    return _fake_parts(group, _Sent(x, scale, topk_weights), options, sizes[8], sizes[1])


def _redispatch_setup(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, scale, _, plan, where, sizes = inputs
    _save(ctx, plan, where, sizes)
    if scale is not None:
        ctx.mark_non_differentiable(*output[:2])


def _redispatch_backward(
    ctx: _Context, grad_rows: Tensor, _: Tensor, grad_weights: Tensor, *__: Tensor
) -> tuple[Any, ...]:
    needs_x, needs_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    grad_x, grad_topk_weights = _combine_gradients(ctx, grad_rows, grad_weights if needs_weights else None, needs_x)
    return grad_x, None, grad_topk_weights, [None] * _PLAN_TENSORS, None, None


redispatch.register_autograd(_redispatch_backward, setup_context=_redispatch_setup)


def _save(ctx: _Context, plan: Sequence[Tensor], where: str, sizes: Sequence[int]) -> None:
    ctx.where, ctx.sizes = where, sizes
    ctx.group = _group(where, sizes)  # keeps it alive until backward has run
    ctx.save_for_backward(*plan)


def _combine_gradients(
    ctx: _Context, rows: Tensor, weights: Tensor | None, needs_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Run the backward of dispatch or redispatch: one combine, of the gradients that are needed."""
    common.refuse_transformed(rows, weights)
    sizes = list(ctx.sizes)
    if not needs_x:
        sizes[2] = NARROWEST_HIDDEN
        rows = carriers(rows, rows.shape[:-1])
    weights = None if weights is None else weights.contiguous()
    x, topk_weights = combine(rows.contiguous(), weights, [], list(ctx.saved_tensors), ctx.where, sizes)
    return x if needs_x else None, None if weights is None else topk_weights


# ---------------------------------------------------------------------- combine


@torch.library.custom_op(
    "tokenferry::combine",
    mutates_args=(),
    schema="(Tensor y, Tensor? topk_weights, Tensor[] biases, Tensor[] plan, str where, SymInt[] sizes) -> "
    "(Tensor, Tensor)",
)
def combine(
    y: Tensor, topk_weights: Tensor | None, biases: list[Tensor], plan: list[Tensor], where: str, sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    """Combine rows along a plan; return the sums and the weights (empty if none were given)."""
    group, full_plan = _unpack_plan(where, sizes, plan)
    weights_sent = own_weights(topk_weights, full_plan)
    sums = group.combine(y, full_plan, topk_weights=weights_sent, bias=tuple(biases))
    weights = y.new_empty(0, dtype=torch.float32) if sums.topk_weights is None else sums.topk_weights
    return _apart((sums.x, weights))


@combine.register_fake
def _combine_fake(
    y: Tensor, topk_weights: Tensor | None, biases: list[Tensor], plan: list[Tensor], where: str, sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    _keep_order()
    weights = (0,) if topk_weights is None else (sizes[7], sizes[1])
    return y.new_empty(sizes[7], y.shape[-1]), y.new_empty(weights, dtype=torch.float32)


def _combine_setup(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, biases, plan, where, sizes = inputs
    ctx.num_biases = len(biases)
    _save(ctx, plan, where, sizes)


def _combine_backward(ctx: _Context, grad_x: Tensor, grad_weights_sum: Tensor) -> tuple[Any, ...]:
    common.refuse_transformed(grad_x, grad_weights_sum)
    needs_y, needs_weights, *_ = ctx.needs_input_grad
    grad_y = grad_weights = None
    if needs_y or needs_weights:
        sizes, rows = list(ctx.sizes), grad_x
        if not needs_y:
            sizes[2] = NARROWEST_HIDDEN
            rows = carriers(rows, rows.shape[:1])
        weights = grad_weights_sum.contiguous() if needs_weights else None
        plan = list(ctx.saved_tensors)
        grad_y, _, grad_weights, *_ = redispatch(rows.contiguous(), None, weights, plan, ctx.where, sizes)
    grads = grad_y if needs_y else None, grad_weights if needs_weights else None
    return *grads, [grad_x] * ctx.num_biases, [None] * _PLAN_TENSORS, None, None


combine.register_autograd(_combine_backward, setup_context=_combine_setup)


def _keep_order() -> None:
    keep_order([op._opoverload for op in (dispatch, redispatch, combine, sum_over)])


# ---------------------------------------------------------------------- along a plan


def redispatch_along(
    group: ExpertGroup, plan: Plan, x: Tensor, scale: Tensor | None, topk_weights: Tensor | None
) -> tuple[Tensor, ...]:
    """Call the operator `redispatch`."""
    where, sizes = pack(group, plan.group_key, plan.options, plan.num_tokens, plan.num_delivered)
    parts: tuple[Tensor, ...] = redispatch(x, scale, topk_weights, tensors_of(plan), where, sizes)
    return parts


def combine_along(
    group: ExpertGroup, plan: Plan, y: Tensor, topk_weights: Tensor | None, biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Call the operator `combine`."""
    where, sizes = pack(group, plan.group_key, plan.options, plan.num_tokens, plan.num_delivered)
    sums, weights = combine(y, topk_weights, list(biases), tensors_of(plan), where, sizes)
    return sums, weights
