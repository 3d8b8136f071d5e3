"""Dispatch and combine of `HybridEPBuffer` on an `ExpertGroup`: maps of chosen experts, and what fits into a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenferry.ambient import methods_not_compiled
from tokenferry.api import ExpertGroup
from tokenferry.checks import FLOATS, INDICES, Checks, check_plain
from tokenferry.compat.deep_ep.arguments import check_alignment, check_integer, detached, to_native, width
from tokenferry.compat.deep_ep.config import MAX_CHOICES, round_up
from tokenferry.compat.deep_ep.dialects import COUNTS, HYBRID, HYBRID_COMBINE, HYBRID_DISPATCH, MOST_CHOICES
from tokenferry.compat.deep_ep.handles import HandleBase
from tokenferry.compat.deep_ep.throughput import ANY_NUM_TOKENS
from tokenferry.compat.deep_ep.views import Views
from tokenferry.compat.deep_ep.wording import Step
from tokenferry.errors import ArgumentError, PlanError, ShapeError, TokenferryError
from tokenferry.types import Dispatched, DispatchOptions, Layout, Plan, Quantized, Routing

DISPATCH, COMBINE = HYBRID_DISPATCH, HYBRID_COMBINE

_BOOL, _FLOAT32 = (torch.bool,), (torch.float32,)
_E = {"num_experts": "num_of_experts"}
_TOKENS_PER_EXPERT, _NUM_TOKENS, _OVERFLOW = 7, 8, 10


@dataclass(frozen=True, slots=True, eq=False)
@methods_not_compiled
class HybridHandle(HandleBase):
    """The handle of a dispatch, not consumed by the calls that use it.

    Of DeepEP's eleven elements it has ``[7]``, the tokens of each local expert, ``[8]``, the tokens of this rank, and
    ``[-1]``, the overflow flag; the others, which describe DeepEP's own buffers, are None.

    Attributes:
        plan: The native plan.
        topk_idx: ``[T, K]``: the experts that rows were sent to, -1 in unused slots.
        num_experts: E.
        pad_multiple: A.
        tokens_per_expert: ``[L]`` int64, each rounded up to A.
        overflow: ``[1]`` int32: not 0 if rows for this rank, or choices of its tokens, were dropped.
    """

    _NUM_ELEMENTS: ClassVar[int] = 11

    plan: Plan
    topk_idx: Tensor
    num_experts: int
    pad_multiple: int
    tokens_per_expert: Tensor
    overflow: Tensor

    def managed_by_torch(self) -> tuple[Tensor | None, ...]:
        """See `HoldsTensors`."""
        return (self.topk_idx, self.tokens_per_expert, self.overflow, *self.plan._managed_by_torch())

    def _element(self, place: int) -> Any:  # noqa: ANN401 - see HandleBase
        found = {_TOKENS_PER_EXPERT: self.tokens_per_expert, _NUM_TOKENS: self.plan.num_tokens}
        return self.overflow if place == _OVERFLOW else found.get(place)


@dataclass(slots=True, eq=False)
class Arguments:
    """The arguments of a dispatch as they were given, besides rows and handle; they have the names of DeepEP."""

    topk_idx: Tensor | None
    topk_weights: Tensor | None
    num_of_experts_per_rank: int | None
    num_of_experts: int | None
    routing_map: Tensor | None
    probs: Tensor | None
    num_permuted_tokens: int | Tensor | None
    pad_multiple: int | None
    non_blocking: bool


@dataclass(slots=True, eq=False)
class Chosen:
    """The experts of each token.

    Attributes:
        routing_map: ``[T, E]`` bool.
        topk_idx: ``[T, K]``, or None if only the map is known.
        probs: ``[T, E]`` float32, or None.
        alignment: A.
        budget: Rows of the results; None: as many as arrive.
    """

    routing_map: Tensor
    topk_idx: Tensor | None
    probs: Tensor | None
    alignment: int
    budget: int | None


# ---------------------------------------------------------------------- checks


def checked_rows(group: ExpertGroup, hidden: object, scale: object) -> Tensor | Quantized:
    """Check everything about rows and scales here: numbers travel before them, and other ranks would wait for rows.

    Raises:
        ShapeError: they cannot be sent; names the argument.
    """
    if isinstance(hidden, tuple):
        raise ShapeError(f"{DISPATCH}: hidden: expected a tensor [T, H], got a tuple; pass scales as scaling_factor")
    check = Checks(DISPATCH, group.device)
    data = check.tensor("hidden", hidden, "T H", None)
    check_plain(DISPATCH, "hidden", data)
    check.row_bytes("hidden", data)
    if scale is None:
        return to_native(DISPATCH, data, "hidden")[0]
    scales = check.tensor("scaling_factor", scale, "T S", None, contiguous=False)
    check_plain(DISPATCH, "scaling_factor", scales)
    return Quantized(detached(data), detached(scales))


def resolved(group: ExpertGroup, num_tokens: int, given: Arguments) -> Chosen:
    """Return the experts of a dispatch without a handle.

    Raises:
        ArgumentError: an argument is missing, or contradicts another; names it.
        ShapeError, RoutingError: a tensor is wrong; names it.
    """
    check = Checks(DISPATCH, group.device).given("hidden", T=num_tokens)
    index, E = given.topk_idx, given.num_of_experts
    if given.routing_map is not None:
        for name, other, dtypes in (
            ("topk_idx", given.topk_idx, INDICES),
            ("topk_weights", given.topk_weights, _FLOAT32),
        ):
            if other is not None:
                check.tensor(name, other, "T K", dtypes, contiguous=False)
        routing_map, index = check.tensor("routing_map", given.routing_map, "T E", _BOOL), None
        if given.topk_weights is not None and given.probs is None:
            raise ArgumentError(f"{DISPATCH}: topk_weights: belong to topk_idx, but routing_map counts; pass probs")
        E = routing_map.shape[1]
    elif index is None or E is None:
        raise ArgumentError(f"{DISPATCH}: expected routing_map, or topk_idx and num_of_experts; pass one of them")
    else:
        check_integer(DISPATCH, "num_of_experts", E, 1)
        index = check.tensor("topk_idx", index, "T K", INDICES).long()
        if group.device.type == "cpu":
            check.experts("topk_idx", index, E)
        routing_map = map_of(index, E)
    _check_num_experts(group, E, given)
    probs = given.probs
    if probs is not None:
        check.given("the experts", E=E).tensor("probs", probs, "T E", _FLOAT32)
    elif given.topk_weights is not None and index is not None:
        probs = spread(detached(check.tensor("topk_weights", given.topk_weights, "T K", _FLOAT32)), index, E)
    if probs is not None:  # they are sent behind numbers
        check_plain(DISPATCH, "probs", probs.resolve_neg())
    if given.num_permuted_tokens is not None:
        check_integer(DISPATCH, "num_permuted_tokens", given.num_permuted_tokens, 1)
    elif given.non_blocking:
        raise ArgumentError(f"{DISPATCH}: non_blocking: needs num_permuted_tokens, got None; pass both")
    alignment = _alignment(DISPATCH, given.pad_multiple)
    check_alignment(DISPATCH, "pad_multiple", alignment, max(1, E // group.num_ranks), 0)
    return Chosen(routing_map, index, probs, alignment, cast("int | None", given.num_permuted_tokens))


def _alignment(call: str, pad_multiple: int | None) -> int:
    """Return A; None and, as in DeepEP, 0 mean 1."""
    if pad_multiple is None:
        return 1
    check_integer(call, "pad_multiple", pad_multiple, 0)
    return pad_multiple or 1


def _check_num_experts(group: ExpertGroup, num_experts: int, given: Arguments) -> None:
    local = num_experts // group.num_ranks
    for name, wanted in (("num_of_experts_per_rank", local), ("num_of_experts", num_experts)):
        got = getattr(given, name)
        if got is not None and (type(got) is not int or got != wanted):
            raise ArgumentError(
                f"{DISPATCH}: {name}: expected {wanted}, since {num_experts} experts were given for {group.num_ranks} "
                f"ranks, got {got!r}"
            )


def checked_handle(call: str, handle: object, pad_multiple: int | None) -> HybridHandle:
    """Return a handle.

    Raises:
        PlanError: it does not come from a dispatch of `HybridEPBuffer`.
        ArgumentError: ``pad_multiple`` is not None, and not that of the dispatch.
    """
    if not isinstance(handle, HybridHandle):
        raise PlanError(
            f"{call}: handle: expected the one that tokenferry's {DISPATCH} returned, got {type(handle).__name__}; "
            "pass it on as it is"
        )
    if pad_multiple is not None and _alignment(call, pad_multiple) != handle.pad_multiple:
        raise ArgumentError(
            f"{call}: pad_multiple: expected {handle.pad_multiple}, as in the dispatch that made handle, got "
            f"{pad_multiple!r}"
        )
    return handle


def check_again(group: ExpertGroup, num_tokens: int, given: Arguments, handle: HybridHandle) -> None:
    """Check the arguments of a dispatch with a handle.

    Raises:
        ArgumentError: an argument contradicts the handle; names it.
        ShapeError: ``probs`` are wrong.
    """
    for name in ("topk_idx", "topk_weights", "routing_map"):
        if getattr(given, name) is not None:
            raise ArgumentError(
                f"{DISPATCH}: {name}: expected None, since handle has the routing; leave out one of them"
            )
    rows, known = given.num_permuted_tokens, handle.plan.num_delivered
    if isinstance(rows, Tensor) and rows.dtype in INDICES and rows.numel() == 1:
        # Megatron-Core passes a sum of counts, on their device.
        rows = int(rows) if group.device.type == rows.device.type == "cpu" else None
    if rows is not None and (type(rows) is not int or rows != known):
        raise ArgumentError(f"{DISPATCH}: num_permuted_tokens: expected None or {known}, as in handle, got {rows!r}")
    check = Checks(DISPATCH, group.device).given("the handle", T=handle.plan.num_tokens, E=handle.num_experts)
    if num_tokens != handle.plan.num_tokens:
        raise ArgumentError(
            f"{DISPATCH}: hidden: expected {handle.plan.num_tokens} rows, as in the dispatch that made handle, got "
            f"{num_tokens}"
        )
    _check_num_experts(group, handle.num_experts, given)
    if given.probs is not None:
        check.tensor("probs", given.probs, "T E", _FLOAT32)


def check_returned(group: ExpertGroup, hidden: Tensor, probs: Tensor | None, handle: HybridHandle) -> None:
    """Raise ShapeError unless there is a row, and a probability if any, for each that was delivered."""
    check = Checks(COMBINE, group.device).given("the handle", rows=handle.plan.num_delivered)
    check.tensor("hidden", hidden, "rows H", FLOATS)
    if probs is not None:
        check.tensor("probs", probs, "rows", _FLOAT32)


# ---------------------------------------------------------------------- calls


def map_of(topk_idx: Tensor, num_experts: int) -> Tensor:
    """Return ``[T, E]`` bool: the experts that a token has chosen."""
    chosen = torch.zeros(topk_idx.shape[0], num_experts + 1, dtype=torch.bool, device=topk_idx.device)
    return chosen.scatter_(1, _columns(topk_idx, num_experts), True)[:, :num_experts].contiguous()


def spread(values: Tensor, topk_idx: Tensor, num_experts: int) -> Tensor:
    """Return ``[T, E]``: for each expert the sum of the ``values`` ``[T, K]`` of its slots, 0 without any."""
    table = torch.zeros(topk_idx.shape[0], num_experts + 1, dtype=values.dtype, device=values.device)
    return table.scatter_add_(1, _columns(topk_idx, num_experts), values)[:, :num_experts].contiguous()


def _columns(topk_idx: Tensor, num_experts: int) -> Tensor:
    """Return the column of each slot in a table of experts; unused ones have one of their own, the last."""
    return torch.where(topk_idx < 0, num_experts, topk_idx.long())


def _without_repeats(topk_idx: Tensor) -> Tensor:
    """Return ``[T, K]``: the same experts, each in one slot only, so that its weight is sent once."""
    index = topk_idx.sort(1).values
    index[:, 1:].masked_fill_(index[:, 1:] == index[:, :-1], -1)
    return index


def dispatch(
    views: Views, rows: Tensor | Quantized, chosen: Chosen, num_sms: int | None
) -> tuple[Dispatched[Tensor | Quantized], HybridHandle]:
    """Send rows to their experts, and wait for the counts. Collective.

    The ranks agree first on the most choices of a token, which the map does not bound.
    """
    index, routing_map, A = chosen.topk_idx, chosen.routing_map, chosen.alignment
    if index is None:
        _check_sizes(views, routing_map.shape[1], 1, width(rows), ANY_NUM_TOKENS)
        most = routing_map.sum(1).amax(dim=0, keepdim=True) if len(routing_map) else _zero(views, torch.int64)
        index = _indices(routing_map, max(1, int(_gathered(views, most, MOST_CHOICES).amax().item())))
    else:
        index = _without_repeats(index)
    options = DispatchOptions(Layout.EXPERTS, alignment=A, zero_padding=A > 1)
    sent = _sent(views, rows, chosen, index, ANY_NUM_TOKENS, options, num_sms)
    padded = [round_up(count, A) for count in sent.host_counts or ()]
    counts = torch.tensor(padded, dtype=torch.int64, device="cpu")
    return sent, HybridHandle(sent.plan, index, routing_map.shape[1], A, counts, _zero(views, torch.int32))


def dispatch_into(
    views: Views, rows: Tensor | Quantized, chosen: Chosen, most_tokens: int, num_sms: int | None
) -> tuple[Dispatched[Tensor | Quantized], HybridHandle]:
    """Send as many rows as fit into the budget of each rank; the host does not wait. Collective.

    Ranks first exchange how many tokens they have for each expert. So each knows the places of its rows, and
    sends only those that lie inside of the budget.

    Args:
        views: Views of the group.
        rows: The rows.
        chosen: Their experts, and the budget, the same on all ranks.
        most_tokens: M, the same on all ranks.
        num_sms: SMs that the call may occupy; None: the library's choice.
    """
    group, A, budget, num_experts = views.group, chosen.alignment, chosen.budget, chosen.routing_map.shape[1]
    assert budget is not None
    top_k = num_experts if group.backend == "cpu" else min(num_experts, MAX_CHOICES)
    _check_sizes(views, num_experts, top_k, width(rows), most_tokens)
    wanted = chosen.routing_map & (chosen.routing_map.cumsum(1) <= top_k)
    counts = _gathered(views, wanted.sum(0).to(torch.int32), COUNTS)
    total = counts.sum(0).view(group.num_ranks, -1)
    padded = _rounded_up(total, A)
    first, space = padded.cumsum(1) - padded, budget // A * A
    place = first.flatten() + counts[: group.rank].sum(0) + wanted.cumsum(0) - 1
    overflows = (first + total > space)[group.rank].any() | (wanted != chosen.routing_map).any()
    index = _indices(wanted & (place < space), top_k)
    options = DispatchOptions(Layout.EXPERTS, alignment=A, zero_padding=A > 1, counts="device", capacity=budget)
    sent = _sent(views, rows, chosen, index, most_tokens, options, num_sms)
    here, flag = _rounded_up(sent.expert_counts.long(), A), overflows.to(torch.int32).reshape(1)
    return sent, HybridHandle(sent.plan, index, num_experts, A, here, flag)


def dispatch_again(
    views: Views, rows: Tensor | Quantized, probs: Tensor | None, handle: HybridHandle, num_sms: int | None
) -> Dispatched[Tensor | Quantized]:
    """Send new rows to where those of ``handle`` went. Collective."""
    weights = None if probs is None else _weights(probs, handle.topk_idx)
    try:
        view = _view_of(views, handle, width(rows))
        return view.redispatch(rows, handle.plan, topk_weights=weights, num_sms=num_sms)
    except TokenferryError as error:
        HYBRID.put(error, DISPATCH, views)
        raise


def combine(
    views: Views, hidden: Tensor, probs: Tensor | None, handle: HybridHandle, num_sms: int | None
) -> tuple[Tensor, Tensor | None]:
    """Add up the rows of each token; return them and, if ``probs`` were given, ``[T, E]`` float32. Collective."""
    try:
        view = _view_of(views, handle, hidden.shape[1])
        done = view.combine(hidden, handle.plan, topk_weights=probs, num_sms=num_sms)
    except TokenferryError as error:
        HYBRID.put(error, COMBINE, views)
        raise
    if done.topk_weights is None:
        return done.x, None
    return done.x, spread(done.topk_weights, handle.topk_idx, handle.num_experts)


def _sent(
    views: Views,
    rows: Tensor | Quantized,
    chosen: Chosen,
    index: Tensor,
    most_tokens: int,
    options: DispatchOptions,
    num_sms: int | None,
) -> Dispatched[Tensor | Quantized]:
    weights = None if chosen.probs is None else _weights(chosen.probs, index)
    try:
        view = views.of(chosen.routing_map.shape[1], index.shape[1], width(rows), most_tokens)
        return view.dispatch(rows, Routing(index, weights), options=options, num_sms=num_sms)
    except TokenferryError as error:
        HYBRID.put(error, DISPATCH, views, num_experts=chosen.routing_map.shape[1], renamed=_E)
        raise


def _check_sizes(views: Views, num_experts: int, top_k: int, hidden: int, most_tokens: int) -> None:
    """Raise, before numbers are sent, what a view for these sizes raises."""
    try:
        views.of(num_experts, top_k, hidden, most_tokens)
    except TokenferryError as error:
        HYBRID.put(error, DISPATCH, views, renamed=_E)
        raise


def _view_of(views: Views, handle: HybridHandle, hidden: int) -> ExpertGroup:
    return views.of(handle.num_experts, handle.topk_idx.shape[1], hidden, ANY_NUM_TOKENS)


def _weights(probs: Tensor, topk_idx: Tensor) -> Tensor:
    """Return ``[T, K]``: the probabilities of the experts in each slot, 0 in unused ones."""
    return detached(probs).gather(1, topk_idx.clamp(min=0)).masked_fill(topk_idx < 0, 0.0)


def _indices(routing_map: Tensor, top_k: int) -> Tensor:
    """Return ``[T, K]``: the chosen experts of each token in ascending order, then -1."""
    num_experts = routing_map.shape[1]
    experts = torch.arange(num_experts, dtype=torch.int64, device=routing_map.device)
    index = torch.where(routing_map, experts, num_experts).sort(1).values[:, :top_k]
    return index.masked_fill(index == num_experts, -1).contiguous()


def _gathered(views: Views, numbers: Tensor, step: Step) -> Tensor:
    """Return ``[R, n]`` int64: the ``[n]`` numbers of each rank. Collective; the host does not wait.

    Numbers of different steps have different dtypes, so that they are never taken for each other.
    """
    group, num_ranks = views.group, views.group.num_ranks
    top_k = min(num_ranks, MAX_CHOICES)
    num_rows = -(-num_ranks // top_k)
    ranks = torch.arange(num_ranks, dtype=torch.int64, device=group.device)
    to = pad(ranks, (0, num_rows * top_k - num_ranks), value=-1).view(num_rows, top_k)
    row = pad(numbers, (0, -numbers.shape[0] % (16 // numbers.element_size()))).expand(num_rows, -1).contiguous()
    message = Quantized(row, row.new_empty((num_rows, 0)))
    options = DispatchOptions(counts="device", capacity=num_ranks)
    try:
        view = views.of(num_ranks, top_k, row.shape[1], num_rows)
        sent = view.dispatch(message, Routing(to), options=options)
    except TokenferryError as error:
        HYBRID.put(error, DISPATCH, views, step)
        raise
    return sent.x.data[:, : numbers.shape[0]].long()


def _rounded_up(counts: Tensor, multiple: int) -> Tensor:
    return (counts + (multiple - 1)) // multiple * multiple


def _zero(views: Views, dtype: torch.dtype) -> Tensor:
    return torch.zeros(1, dtype=dtype, device=views.group.device)
