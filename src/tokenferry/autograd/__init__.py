"""Differentiable dispatch, redispatch and combine: the backward of each is another one of them.

============ ================================ ===============================================================
forward      backward                         carries
============ ================================ ===============================================================
dispatch     combine                          gradients of rows, and of ``topk_weights`` where they were sent
redispatch   combine                          the same
combine      redispatch, along the same plan  gradients of rows, and of ``topk_weights`` where they were sent;
                                              the gradient of a bias is the incoming one
============ ================================ ===============================================================

Second derivatives therefore work too. In a trace the three calls are torch.library ops (``tokenferry::dispatch`` and
so on) with fake implementations: they trace under ``torch.compile(fullgraph=True)`` and run on fake tensors. With
``counts="host"`` the number of received rows is a dynamic size of the graph; with ``counts="device"`` every received
shape is static. Where nothing traces, the same calls are made without the ops, which take the host longer.

Contract, beyond that of `tokenferry.ExpertGroup`:
    Collective in backward: every forward call has one collective call in backward (none, if only a bias needs a
        gradient), in the order in which autograd traverses the graph, which is the same on all ranks if they built the
        same graph; generated code keeps that order. It carries the gradients that are needed. Therefore every rank must
        run backward, requires_grad of each argument must agree, and a rank with T = 0 or N = 0 must not break the
        graph: it passes its empty tensors through the same operations.
    Padding: rows that hold no data (alignment, capacity) are zero in results and in gradients, whatever
        ``DispatchOptions.zero_padding`` is, so that a weight gradient ``x^T g`` never reads uninitialised memory.
        Values that the caller writes into such rows are never read.
    Quantized rows have no gradient: bytes are not differentiable. ``routing.topk_weights`` still has one. With
        ``quantize`` rows are cast only to be sent, and have gradients, which travel in the dtype of the rows.
    Lifetime: a graph keeps its group alive. A *compiled* graph only holds the key of the group: keep a reference.
    Memory: CUDA: rows that a graph keeps are copied out of the heap.
    Plans: CUDA: a compiled function takes a plan that was made in a trace, or the copy of another (`copy.copy`).
    Numerics: gradients are summed as `ExpertGroup.combine` sums, and are bitwise reproducible.
    Stream: CUDA: the call in backward runs on the stream of its forward, as torch does it for all operations.
    Host and CUDA graphs: the call in backward is a `combine` or `redispatch`, neither of which waits for the device:
        both are capturable, with every plan. A forward `dispatch` is with ``counts="device"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tokenferry.api import ExpertGroup
from tokenferry.autograd import ops
from tokenferry.autograd.common import zeroing
from tokenferry.autograd.eager import GroupCalls, Sent, is_traced
from tokenferry.checks import check_operand, wrong_operand, wrong_routing
from tokenferry.errors import ArgumentError, PlanError, ShapeError
from tokenferry.types import Combined, Dispatched, DispatchOptions, Layout, Plan, Quantized, Routing, Scale

__all__ = ["combine", "dispatch", "redispatch"]


@overload
def dispatch(
    group: ExpertGroup,
    x: Tensor,
    routing: Routing,
    *,
    options: DispatchOptions | None = None,
    quantize: Scale | None = None,
) -> Dispatched[Tensor]: ...


@overload
def dispatch(
    group: ExpertGroup, x: Quantized, routing: Routing, *, options: DispatchOptions | None = None
) -> Dispatched[Quantized]: ...


def dispatch(
    group: ExpertGroup,
    x: Tensor | Quantized,
    routing: Routing,
    *,
    options: DispatchOptions | None = None,
    quantize: Scale | None = None,
) -> Dispatched[Tensor] | Dispatched[Quantized]:
    """Call `ExpertGroup.dispatch` with gradients of ``x`` and of ``routing.topk_weights``.

    Contract: collective, and so is its backward: one `combine`, on the stream of this call, capturable; see the top of
    this module. Arguments, results and errors as `ExpertGroup.dispatch`, but ``zero_padding`` is always on, and
    ``host_counts`` is None in a traced graph.

    Args:
        group: The group.
        x: Rows to send.
        routing: As for `ExpertGroup.dispatch`.
        options: As for `ExpertGroup.dispatch`.
        quantize: Cast rows to FP8 to send them, with scales of this format (`tokenferry.formats.fp8.cast`), and back to
            their dtype where they arrive. Gradients are those of the rows as they arrive, in the dtype of the rows, as
            if the cast were the identity. None: rows are sent as they are.

    Returns:
        Dispatched: as from `ExpertGroup.dispatch`; ``x`` and ``topk_weights`` have gradients.

    Raises:
        ArgumentError: a `Quantized` requires grad, or is to be cast; or ``quantize`` is no `Scale`.
        ShapeError: rows to be cast are not floating-point ``[T, H]``. And whatever `ExpertGroup.dispatch` raises.

    Example:
        >>> import torch, tokenferry
        >>> from tokenferry import autograd
        >>> shape = tokenferry.MoeShape(num_experts=2, top_k=2, hidden=4, max_tokens=8)
        >>> group = tokenferry.ExpertGroup(None, shape, backend="cpu")
        >>> x = torch.ones(1, 4, requires_grad=True)
        >>> sent = autograd.dispatch(group, x, tokenferry.Routing(torch.tensor([[0, 1]])))
        >>> autograd.combine(group, 3 * sent.x, sent.plan).x.sum().backward()
        >>> x.grad
        tensor([[3., 3., 3., 3.]])
    """
    options = DispatchOptions() if options is None else options
    data, scale = _data_and_scale("dispatch", x)
    if not isinstance(routing, Routing):
        raise wrong_routing("dispatch", routing)
    _only_tensors("dispatch", topk_idx=routing.topk_idx, topk_weights=routing.topk_weights)
    if quantize is not None:
        _can_be_cast(group, x, quantize)
    if not is_traced(data, scale, routing.topk_idx, routing.topk_weights):
        sent = GroupCalls(group, quantize=quantize).dispatch(options, x, routing.topk_idx, routing.topk_weights)
        return _with_gradients(sent, sent.whole.plan)
    _reach_operators("dispatch", data, scale, topk_idx=routing.topk_idx, topk_weights=routing.topk_weights)
    where, sizes = ops.pack(group, group.key, options, 0, 0)
    where = ops.with_cast(where, quantize)
    rows, scales, weights, host_ints, offsets, *tensors = ops.dispatch(
        data, scale, routing.topk_idx, routing.topk_weights, where, sizes
    )
    plan = ops.plan_of((*tensors, host_ints), group.key, zeroing(options), data.shape[0], ops.num_rows(rows))
    return _dispatched((rows, scales, weights, host_ints, offsets), plan, x, routing.topk_weights)


@overload
def redispatch(
    group: ExpertGroup, x: Tensor, plan: Plan, *, topk_weights: Tensor | None = None
) -> Dispatched[Tensor]: ...


@overload
def redispatch(
    group: ExpertGroup, x: Quantized, plan: Plan, *, topk_weights: Tensor | None = None
) -> Dispatched[Quantized]: ...


def redispatch(
    group: ExpertGroup, x: Tensor | Quantized, plan: Plan, *, topk_weights: Tensor | None = None
) -> Dispatched[Tensor] | Dispatched[Quantized]:
    """Call `ExpertGroup.redispatch` with gradients of ``x`` and of ``topk_weights``.

    Contract: collective, and so is its backward: one `combine`, on the stream of this call, capturable; see the top of
    this module. Arguments, results and errors as `ExpertGroup.redispatch`, with the same differences as `dispatch`.

    Args:
        group: The group.
        x: Rows to send: ``[T, H]``, or a `Quantized`, which has no gradient.
        plan: The plan of a `dispatch` or `redispatch` of this group.
        topk_weights: ``[T, K]`` float32 to send with the rows, or None.

    Returns:
        Dispatched: as from `ExpertGroup.redispatch`; ``x`` and ``topk_weights`` have gradients.

    Raises:
        ArgumentError: a `Quantized` requires grad.
        PlanError: the plan was made in inference mode, and an input requires grad. And whatever
            `ExpertGroup.redispatch` raises.
    """
    data, scale = _data_and_scale("redispatch", x)
    _only_tensors("redispatch", topk_weights=topk_weights)
    _can_be_saved("redispatch", plan, data, topk_weights)
    if not is_traced(data, scale, topk_weights):
        return _with_gradients(GroupCalls(group).redispatch(plan, x, topk_weights), plan)
    _reach_operators("redispatch", data, scale, topk_weights=topk_weights)
    parts = ops.redispatch_along(group, plan, data, scale, topk_weights)
    return _dispatched(parts, plan, x, topk_weights)


def combine(
    group: ExpertGroup,
    y: Tensor,
    plan: Plan,
    *,
    topk_weights: Tensor | None = None,
    bias: Tensor | tuple[Tensor, ...] | None = None,
) -> Combined:
    """Call `ExpertGroup.combine` with gradients of ``y``, ``topk_weights`` and the biases.

    Contract: collective, and so is its backward: one `redispatch`, on the stream of this call, capturable; none if only
    a bias needs a gradient. See the top of this module. Arguments, results and errors as `ExpertGroup.combine`, without
    ``out``; ROWS: weights in slots of other ranks' experts count as 0.

    Args:
        group: The group.
        y: The experts' outputs in the layout of ``Dispatched.x``; rows past the counts are not read, and their
            gradients are zero.
        plan: The plan of a `dispatch` or `redispatch` of this group; not consumed.
        topk_weights: float32 in the shape of ``Dispatched.topk_weights``, to be returned and added up per slot, or
            None.
        bias: One or two ``[T, H]`` tensors of y's dtype, with which the sum starts, or None.

    Returns:
        Combined: ``x`` ``[T, H]`` and, if weights were given, ``topk_weights`` ``[T, K]``, both with gradients.

    Raises:
        PlanError: the plan was made in inference mode, and an input requires grad; or as `ExpertGroup.combine`.
        ShapeError, CapacityError, MismatchError, PeerTimeout, ClosedError: as `ExpertGroup.combine`.
    """
    biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
    named = {f"bias[{i}]": one for i, one in enumerate(biases)}
    _only_tensors("combine", y=y, topk_weights=topk_weights, **named)
    _can_be_saved("combine", plan, y, topk_weights, *biases)
    if not is_traced(y, topk_weights, *biases):
        return Combined(*GroupCalls(group).combine(plan, y, topk_weights, *biases))
    _reach_operators("combine", y=y, topk_weights=topk_weights, **named)
    x, weights = ops.combine_along(group, plan, y, topk_weights, biases)
    return Combined(x, None if topk_weights is None else weights)


def _data_and_scale(call: str, x: Tensor | Quantized) -> tuple[Tensor, Tensor | None]:
    if not isinstance(x, Quantized):
        _only_tensors(call, x=x)
        return x, None
    _only_tensors(call, **{"x.data": x.data, "x.scale": x.scale})
    if torch.is_grad_enabled() and (x.data.requires_grad or x.scale.requires_grad):
        raise ArgumentError(f"{call}: x: a Quantized has no gradient, but requires grad; detach data and scale")
    return x.data, x.scale


def _can_be_cast(group: ExpertGroup, x: Tensor | Quantized, quantize: object) -> None:
    """Reject rows that cannot be cast: once they are bytes, the group knows no dtype and no width to expect."""
    if not isinstance(quantize, Scale):
        raise ArgumentError(f"dispatch: quantize: expected a tokenferry.Scale or None, got {quantize!r}")
    if isinstance(x, Quantized):
        raise ArgumentError("dispatch: quantize: x is a Quantized already; pass its rows, or quantize=None")
    hidden = group.shape.hidden
    if not x.is_floating_point() or x.ndim != 2 or x.shape[1] != hidden:
        raise ShapeError(
            f"dispatch: x: expected floating point [T, H] with H={hidden} to cast it to FP8, got {x.dtype} "
            f"{list(x.shape)} on {x.device}"
        )


def _only_tensors(call: str, **arguments: object) -> None:
    """Reject arguments that do not fit the schema of an op; the group checks everything else."""
    for name, value in arguments.items():
        optional = name == "topk_weights"
        if not isinstance(value, Tensor) and not (optional and value is None):
            raise wrong_operand(call, name, value)


def _reach_operators(call: str, x: Tensor | None = None, scale: Tensor | None = None, **arguments: object) -> None:
    """Reject tensors that operators would not see, or not all of, before anything is sent.

    A compiler says itself what it cannot do, but for tangents: these end its graph, so that this runs eagerly.
    """
    if torch.compiler.is_compiling():
        if forward_ad._current_level < 0:
            return
        torch._dynamo.graph_break()
    rows = {"x": x} if scale is None else {"x.data": x, "x.scale": scale}
    for name, value in {**rows, **arguments}.items():
        check_operand(call, name, value)


def _can_be_saved(call: str, plan: Plan, *inputs: Tensor | None) -> None:
    """Reject a plan that torch could not keep for backward, before anything is sent."""
    if torch.compiler.is_compiling() or not plan.dst_token.is_inference() or not torch.is_grad_enabled():
        return
    if any(one is not None and one.requires_grad for one in inputs):
        raise PlanError(
            f"{call}: plan: was made in torch.inference_mode(), so that no backward pass can use it; dispatch outside "
            "of inference mode, or pass tensors that do not require grad"
        )


def _with_gradients(sent: Sent, plan: Plan) -> Dispatched[Any]:
    whole = sent.whole
    return Dispatched(
        x=sent.rows,
        topk_idx=whole.topk_idx,
        topk_weights=sent.weights,
        expert_counts=whole.expert_counts,
        expert_offsets=whole.expert_offsets,
        host_counts=whole.host_counts,
        plan=plan,
    )


def _dispatched(
    parts: Sequence[Tensor], plan: Plan, x: Tensor | Quantized, topk_weights: Tensor | None
) -> Dispatched[Any]:
    rows, scales, weights, host_ints, offsets = parts
    layout, num_counts = plan.options.layout, ops.num_host_counts(plan.options, plan.expert_counts.shape[0])
    return Dispatched(
        x=Quantized(rows, scales) if isinstance(x, Quantized) else rows,
        topk_idx=plan.topk_idx if layout is Layout.ROWS else None,
        topk_weights=None if topk_weights is None else weights,
        expert_counts=plan.expert_counts,
        expert_offsets=offsets if layout is Layout.EXPERTS else None,
        host_counts=(ops.ints_of(host_ints) or ())[:num_counts] or None,
        plan=plan,
    )
