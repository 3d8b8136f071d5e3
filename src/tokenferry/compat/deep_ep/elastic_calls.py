"""Dispatch and combine of `ElasticBuffer` and `EPBuffer` on an `ExpertGroup`: checks of arguments, and calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.checks import FLOATS, INDICES, Checks, check_flags
from tokenferry.compat.deep_ep.arguments import (
    Rows,
    check_alignment,
    check_integer,
    detached,
    from_native,
    height,
    to_native,
    width,
)
from tokenferry.compat.deep_ep.config import round_up
from tokenferry.compat.deep_ep.dialects import ELASTIC
from tokenferry.compat.deep_ep.elastic_arguments import Arguments, Request, Returned, Sent
from tokenferry.compat.deep_ep.elastic_handle import EPHandle, is_capturing
from tokenferry.compat.deep_ep.streams import HoldsTensors
from tokenferry.compat.deep_ep.views import Views
from tokenferry.compat.deep_ep.wording import Wording
from tokenferry.errors import ArgumentError, CapacityError, PlanError, ShapeError, TokenferryError
from tokenferry.types import Dispatched, DispatchOptions, Layout, Quantized, Routing

_SCALE_BYTES = 4
_TMA_ROWS = 4
"""Rows to a multiple of which a column of scales is padded: strides of tensor maps are multiples of 16 bytes."""

_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class Received(HoldsTensors):
    """The results of a dispatch.

    Attributes:
        x: Rows, in the form in which they were sent.
        topk_idx: ``[rows, K]`` local experts; None if rows lie by expert.
        topk_weights: The weights that came with the rows, or None.
        handle: The handle.
    """

    x: Rows
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    handle: EPHandle

    def managed_by_torch(self) -> tuple[Tensor | None, ...]:
        """See `HoldsTensors`."""
        rows = (self.x,) if isinstance(self.x, Tensor) else self.x
        return (*rows, self.topk_idx, self.topk_weights, *self.handle.managed_by_torch())


# ---------------------------------------------------------------------- checks


def checked_rows(call: str, x: object, device: torch.device) -> Sent:
    """Return rows for a native call; ``call`` is the method that was called, for errors.

    Raises:
        ShapeError: ``x`` is neither rows nor (rows, scales), or the scales are not ``[T, P]`` of four bytes each.
    """
    rows, scale_dims = to_native(call, x)
    if isinstance(x, tuple):
        scale = x[1]
        if scale.ndim != 2 or scale.element_size() != _SCALE_BYTES:
            raise ShapeError(
                f"{call}: x: expected scales [T, P] of {_SCALE_BYTES} bytes each, such as float32 or int32, got "
                f"{scale.dtype} {list(scale.shape)}; give each row its own scales"
            )
        Checks(call, device).given("x[0]", T=height(rows)).tensor("x[1]", scale, "T P", None, contiguous=False)
    return Sent(rows, scale_dims)


def resolved(group: ExpertGroup, rows: Tensor | Quantized, given: Arguments, most_tokens: int) -> Request:
    """Return the arguments of a dispatch without a handle, after the checks that the native call does not make.

    Args:
        group: The group.
        rows: The rows of the call.
        given: The arguments.
        most_tokens: M of calls that give none; 0: they have to.

    Raises:
        ArgumentError: an argument is missing, or contradicts another; names it.
        ShapeError: a tensor has the wrong shape or dtype; names it.
        CapacityError: T > M.
    """
    call, T = given.call, height(rows)
    topk_idx, E = _required(call, "topk_idx", given.topk_idx), _required(call, "num_experts", given.num_experts)
    M = most_tokens if given.num_max_tokens_per_rank is None else given.num_max_tokens_per_rank
    alignment = 1 if given.expert_alignment is None else given.expert_alignment
    if type(topk_idx) is not Tensor or topk_idx.ndim != 2 or topk_idx.is_nested:
        Checks(call, group.device).given("x", T=T).tensor("topk_idx", topk_idx, "T K", INDICES)
    for name, value in (("num_experts", E), ("expert_alignment", alignment), ("num_max_tokens_per_rank", M)):
        check_integer(call, name, value, 1)
    if alignment > 1:
        L = max(1, E // group.num_ranks)
        most_rows = group.num_ranks * M * min(topk_idx.shape[1], L)
        check_alignment(call, "expert_alignment", alignment, L, most_rows)
    check_integer(call, "num_sms", given.num_sms, 0)
    if T > M:
        raise CapacityError(
            f"{call}: x: T={T} rows exceed num_max_tokens_per_rank={M}; pass a larger one, the same on all ranks, "
            f"to this call or to {call.partition('.')[0]}"
        )
    _check_flags(given)
    cpu_sync = given.do_cpu_sync is None or given.do_cpu_sync
    if cpu_sync and is_capturing(group):
        raise ArgumentError(
            f"{call}: do_cpu_sync: a CUDA graph cannot capture that the host waits for counts; pass do_cpu_sync=False"
        )
    stats = given.cumulative_local_expert_recv_stats
    if stats is not None:
        check = Checks(call, group.device).given("num_experts", L=E // group.num_ranks)
        check.tensor("cumulative_local_expert_recv_stats", stats, "L", (torch.int32,), contiguous=False)
        if stats.stride(0) == 0 and len(stats) > 1:
            raise ShapeError(
                f"{call}: cumulative_local_expert_recv_stats: expected a counter for each of {len(stats)} experts, got "
                "one that is expanded to all of them; pass a tensor with its own memory for each"
            )
    return Request(given, topk_idx, E, M, alignment, cpu_sync)


def check_again(handle: EPHandle, given: Arguments) -> None:
    """Check the arguments of a dispatch with a handle, of which some repeat those of the first dispatch.

    Raises:
        ArgumentError: an argument contradicts the handle; names it.
    """
    call = given.call
    for name in ("topk_idx", "cumulative_local_expert_recv_stats"):
        if getattr(given, name) is not None:
            raise ArgumentError(f"{call}: {name}: expected None, since handle has the routing; leave out one of them")
    for name in ("num_experts", "num_max_tokens_per_rank", "expert_alignment"):
        value, known = getattr(given, name), getattr(handle, name)
        if value is not None and (type(value) is not int or value != known):
            raise ArgumentError(f"{call}: {name}: expected None or {known}, as in handle, got {value!r}")
    _check_flags(given)
    if given.do_expand != handle.do_expand:
        raise ArgumentError(
            f"{call}: do_expand: expected {handle.do_expand}, as in the dispatch that made handle, got "
            f"{given.do_expand}"
        )
    if given.do_cpu_sync:
        raise ArgumentError(f"{call}: do_cpu_sync: a dispatch with a handle never waits; pass None or False")
    check_integer(call, "num_sms", given.num_sms, 0)


def checked_handle(call: str, handle: object) -> EPHandle:
    """Return a handle.

    Raises:
        PlanError: the handle does not come from a dispatch.
    """
    if isinstance(handle, EPHandle):
        return handle
    raise PlanError(
        f"{call}: handle: expected the EPHandle that tokenferry's {call.partition('.')[0]}.dispatch returned, got "
        f"{type(handle).__name__}; pass it on as it is"
    )


def check_returned(device: torch.device, handle: EPHandle, returned: Returned) -> None:
    """Check the arguments of a combine.

    Raises:
        ArgumentError: ``bias`` is a tuple, but not of two, or ``num_sms`` is wrong.
        ShapeError: a tensor has the wrong shape, dtype, device or strides; names it.
    """
    call, weights, bias = returned.call, returned.topk_weights, returned.bias
    check_integer(call, "num_sms", returned.num_sms, 0)
    sizes = {"rows": handle.plan.num_delivered, "K": handle.topk_idx.shape[1], "T": handle.plan.num_tokens}
    check = Checks(call, device).given("the handle", **sizes)
    x = check.tensor("x", returned.x, "rows H", FLOATS)
    if isinstance(bias, tuple) and len(bias) != 2:
        raise ArgumentError(f"{call}: bias: expected a tensor or a tuple of two, got {len(bias)}; add them up first")
    for i, one in enumerate(_biases(bias)):
        check.tensor(f"bias[{i}]" if isinstance(bias, tuple) else "bias", one, "T H", (x.dtype,))
    if weights is not None:
        check.tensor("topk_weights", weights, "rows" if handle.do_expand else "rows K", (torch.float32,))


# ---------------------------------------------------------------------- calls


def dispatch(views: Views, x: Sent, request: Request) -> Received:
    """Send rows by a new routing. Collective.

    Args:
        views: Views of the group.
        x: The rows.
        request: The other arguments.

    Raises:
        ShapeError, RoutingError, CapacityError, MismatchError, PeerTimeout, ClosedError: as `ExpertGroup.dispatch`.
    """
    given, index, rows = request.given, request.topk_idx, x.rows
    weights, stats = given.topk_weights, given.cumulative_local_expert_recv_stats
    options = DispatchOptions(
        Layout.EXPERTS if given.do_expand else Layout.ROWS,
        alignment=request.alignment if given.do_expand else 1,
        zero_padding=bool(given.do_zero_padding),
        counts="host" if request.cpu_sync else "device",
    )
    routing = Routing(index, None if weights is None else detached(weights))
    try:
        view = views.of(request.num_experts, index.shape[1], width(rows), request.max_tokens)
        sent = view.dispatch(rows, routing, options=options, num_sms=_sms(views, given.num_sms))
    except TokenferryError as error:
        _words(given.call).put(error, given.call, views, num_experts=request.num_experts)
        raise
    if stats is not None:
        with torch.inference_mode():  # counters may come from it
            stats.add_(sent.expert_counts)
    handle = EPHandle(sent, request, index.clone() if given.do_handle_copy else index, view)
    received = _in_the_form_of(x, sent, column_major=given.use_tma_aligned_col_major_sf)
    return Received(received, sent.topk_idx, sent.topk_weights, handle)


def dispatch_again(views: Views, x: Sent, handle: EPHandle, given: Arguments) -> Received:
    """Send new rows to where the rows of an earlier dispatch went, as `ExpertGroup.redispatch`. Collective."""
    plan, weights, rows = handle.padded(zero_padding=given.do_zero_padding), given.topk_weights, x.rows
    weights = None if weights is None else detached(weights)
    num_sms = _sms(views, given.num_sms or handle.asked_num_sms)
    try:
        view = views.of(handle.num_experts, handle.topk_idx.shape[1], width(rows), handle.num_max_tokens_per_rank)
        sent = view.redispatch(rows, plan, topk_weights=weights, num_sms=num_sms)
    except TokenferryError as error:
        _words(given.call).put(error, given.call, views)
        raise
    received = _in_the_form_of(x, sent, column_major=given.use_tma_aligned_col_major_sf)
    return Received(received, sent.topk_idx, sent.topk_weights, handle)


def combine(views: Views, handle: EPHandle, returned: Returned) -> tuple[Tensor, Tensor | None]:
    """Add up rows on the ranks of their tokens, as `ExpertGroup.combine`. Collective.

    The weight of a slot comes from the one rank that holds its expert: what other ranks say about it is left out.

    Raises:
        PlanError, ShapeError, MismatchError, PeerTimeout, ClosedError: as `ExpertGroup.combine`.
    """
    x, weights, plan = detached(returned.x), returned.topk_weights, handle.plan
    biases, num_sms = _biases(returned.bias), _sms(views, returned.num_sms or handle.asked_num_sms)
    if weights is not None:
        weights = detached(weights) if handle.do_expand else detached(weights).masked_fill(plan.topk_idx < 0, 0.0)
    # Sums of a node have the dtype of the rows when they cross to another one.
    widens = returned.rounds_once and len(views.nodes) > 1 and x.element_size() < torch.float32.itemsize
    y = x.float() if widens else x
    if widens:
        biases = tuple(one.float() for one in biases)
    try:
        view = views.of(handle.num_experts, handle.topk_idx.shape[1], x.shape[1], handle.num_max_tokens_per_rank)
        done = view.combine(y, plan, topk_weights=weights, bias=biases or None, num_sms=num_sms)
    except TokenferryError as error:
        _words(returned.call).put(error, returned.call, views)
        raise
    return done.x.to(x.dtype) if widens else done.x, done.topk_weights


def _required(call: str, name: str, value: _T | None) -> _T:
    if value is None:
        raise ArgumentError(f"{call}: {name}: expected a value, got None; it may be left out only with a handle")
    return value


def _check_flags(given: Arguments) -> None:
    copy, sync, expand = given.do_handle_copy, given.do_cpu_sync, given.do_expand
    padding, by_column = given.do_zero_padding, given.use_tma_aligned_col_major_sf
    if not (
        type(copy) is type(expand) is type(padding) is type(by_column) is bool and (sync is None or type(sync) is bool)
    ):
        check_flags(
            given.call,
            do_handle_copy=copy,
            do_cpu_sync=sync,
            do_expand=expand,
            do_zero_padding=padding,
            use_tma_aligned_col_major_sf=by_column,
        )
    if given.do_zero_padding and not given.do_expand:
        raise ArgumentError(
            f"{given.call}: do_zero_padding: only rows by expert have padding; pass do_expand=True, or leave it out"
        )


def _words(call: str) -> Wording:
    """Return the words of the class whose method was called."""
    return ELASTIC[call.partition(".")[0]]


def _sms(views: Views, num_sms: int) -> int | None:
    """Return the number of SMs for a native call; None: its own choice, or there are none."""
    return num_sms if num_sms and views.group.backend == "cuda" else None


def _biases(bias: Any) -> tuple[Any, ...]:  # noqa: ANN401 - any argument of a user
    return bias if isinstance(bias, tuple) else () if bias is None else (bias,)


def _in_the_form_of(x: Sent, sent: Dispatched[Tensor | Quantized], *, column_major: bool) -> Rows:
    """Return received rows in the form in which they were sent, with scales by row or by column."""
    if not column_major or not isinstance(sent.x, Quantized) or not x.scale_dims:
        return from_native(sent.x, x.scale_dims)
    data, scale = sent.x.data, sent.x.scale
    num_rows, columns = scale.shape
    padded = torch.empty(columns, round_up(num_rows, _TMA_ROWS), dtype=scale.dtype, device=scale.device)
    by_column = padded.t()[:num_rows]
    by_column.copy_(scale)
    return data, by_column
