"""DeepEP's normal mode on an `ExpertGroup`: layout, dispatch, cached dispatch, combine.

A *handle* is a sequence of seven: DeepEP's six elements, of which those for its channels are None, and the `Plan`; with
several nodes of DeepEP's ten.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenferry.ambient import methods_not_compiled
from tokenferry.checks import INDICES, Checks, check_plain, fits
from tokenferry.compat.deep_ep.arguments import (
    Rows,
    aligned,
    check_integer,
    detached,
    from_native,
    to_native,
    width,
)
from tokenferry.compat.deep_ep.dialects import TOTALS, V1, WITHOUT_EXPERTS
from tokenferry.compat.deep_ep.handles import HandleBase
from tokenferry.compat.deep_ep.streams import HoldsTensors
from tokenferry.compat.deep_ep.views import Views
from tokenferry.errors import ArgumentError, CapacityError, ConfigError, PlanError, TokenferryError
from tokenferry.types import DispatchOptions, Plan, Quantized, Routing

ANY_NUM_TOKENS = 2**31 - 1
"""M of a view whose calls wait for counts: no memory depends on it, so T is unlimited."""

_SRC_TOKEN_ELEMENT = 3
_RANK_PREFIX_ELEMENT = 6
_BOOL = (torch.bool,)


@dataclass(slots=True, eq=False)
class Options:
    """Options of `dispatch`.

    Attributes:
        expert_alignment: Multiple to which the counts in the returned list are rounded up.
        num_worst_tokens: Rows of the results, so that the host does not wait for counts; 0: as many as arrive.
        num_sms: SMs that the call may occupy; None: the library's choice.
        num_experts: E, if `get_dispatch_layout` is known to have made the layout of the routing, so that nothing has to
            be checked; else 0.
    """

    expert_alignment: int = 1
    num_worst_tokens: int = 0
    num_sms: int | None = None
    num_experts: int = 0


@dataclass(slots=True, eq=False)
@methods_not_compiled
class Handle(HandleBase):
    """The handle of a `dispatch`.

    Its elements are: the prefix matrix ``[R, R]`` int32, of which a rank knows only its own column and the others are
    -1; None twice; ``src_token`` ``[N]`` int32; ``in_rank``; None; the plan.

    Attributes:
        plan: The plan of the dispatch.
        in_rank: ``[T, R]`` bool: whether a token goes to a rank.
        rank: This rank.
        num_experts: E of the dispatch.
        top_k: K of the dispatch.
        routed: Whether it had ``topk_idx``; without, E and K are R.
    """

    _NUM_ELEMENTS: ClassVar[int] = 7

    plan: Plan
    in_rank: Tensor
    rank: int
    num_experts: int
    top_k: int
    routed: bool = True

    def managed_by_torch(self) -> tuple[Tensor | None, ...]:
        """See `HoldsTensors`."""
        return (self.in_rank, *self.plan._managed_by_torch())

    def _element(self, place: int) -> Any:  # noqa: ANN401 - see HandleBase
        plan = self.plan
        if place == 0:
            ranks = plan.src_counts.shape[0]
            prefix = torch.full((ranks, ranks), -1, dtype=torch.int32, device=plan.src_counts.device)
            prefix[:, self.rank] = plan.src_counts.cumsum(0)
            return prefix
        if place == _SRC_TOKEN_ELEMENT:
            return plan.src_token.to(torch.int32)
        return {4: self.in_rank, 6: plan}.get(place)


@dataclass(slots=True, eq=False)
@methods_not_compiled
class InternodeHandle(Handle):
    """The handle of a `dispatch` across nodes; see `Handle`. Programs count its elements from the end, so it has ten.

    Its elements are: ``in_rank``; None five times; ``[R]`` int32: the rows received from ranks 0..i; None three times.
    """

    _NUM_ELEMENTS: ClassVar[int] = 10

    def _element(self, place: int) -> Any:  # noqa: ANN401 - see HandleBase
        if place == _RANK_PREFIX_ELEMENT:
            return self.plan.src_counts.cumsum(0).to(torch.int32)
        return self.in_rank if place == 0 else None


@dataclass(slots=True, eq=False)
@methods_not_compiled
class TokenLayout(HoldsTensors):
    """The tensors that `Buffer.get_dispatch_layout` returns.

    Attributes:
        per_rank: ``[R]`` int32: tokens for each rank; a token counts once per rank.
        per_node: ``[nodes]`` int32: tokens for each node, once each, or None if the caller gave none.
        per_expert: ``[E]`` int32: tokens for each expert, or None.
        in_rank: ``[T, R]`` bool: whether a token goes to a rank.
    """

    per_rank: Tensor
    per_node: Tensor | None
    per_expert: Tensor | None
    in_rank: Tensor

    def managed_by_torch(self) -> tuple[Tensor | None, ...]:
        """See `HoldsTensors`."""
        return (self.per_rank, self.per_node, self.per_expert, self.in_rank)


def layout_of(views: Views, topk_idx: Tensor, num_experts: int, call: str) -> TokenLayout:
    """Count the tokens for each rank and expert. Local; never waits for a GPU.

    Raises:
        ShapeError, RoutingError: ``topk_idx`` is wrong (indices outside [-1, E) on a GPU: `dispatch` raises).
        ConfigError: E is not a multiple of R.
    """
    group = views.group
    if not _looks_like_routing(topk_idx, views.device):
        Checks(call, group.device).tensor("topk_idx", topk_idx, "T K", INDICES)
    try:
        views.of(num_experts, 1, 1, 1)
        if not views.on_gpu:
            Checks(call, group.device).experts("topk_idx", topk_idx, num_experts)
        counted = group._token_layout(topk_idx, num_experts)
    except TokenferryError as error:
        V1.put(error, call, views)
        raise
    per_node = counted.per_node
    if per_node is None and not views.on_gpu:  # it is compared with what was given, also for a single node
        per_node = _tokens_of_nodes(views, counted.in_rank)
    return TokenLayout(counted.per_rank, per_node, counted.per_expert, counted.in_rank)


def dispatch(
    views: Views, x: Rows, routing: Routing | None, given: TokenLayout, options: Options
) -> tuple[Rows, Tensor | None, Tensor | None, list[int], Handle]:
    """Send rows by a new routing, of which ``given`` is the layout that the caller passed. Collective.

    Raises:
        ArgumentError: arguments contradict each other; names them.
        ShapeError, RoutingError, CapacityError, MismatchError, PeerTimeout, ClosedError: as `ExpertGroup.dispatch`.
    """
    call, num_worst_tokens = "Buffer.dispatch", options.num_worst_tokens
    check_integer(call, "expert_alignment", options.expert_alignment, 1)
    check_integer(call, "num_worst_tokens", num_worst_tokens, 0)
    rows, scale_dims = to_native(call, x)
    num_experts, (num_tokens, hidden) = options.num_experts, (rows.data if isinstance(rows, Quantized) else rows).shape
    if not num_experts or not views.on_gpu or given.in_rank.shape[0] != num_tokens:
        num_experts = _check_layout(views, given, num_tokens, call)
    if not views.on_gpu:  # where values are compared before they are sent
        check_plain(call, "is_token_in_rank", given.in_rank)
    if routing is None:
        if num_worst_tokens:
            raise ArgumentError(
                f"{call}: num_worst_tokens={num_worst_tokens} needs topk_idx; pass topk_idx and topk_weights"
            )
        if not views.on_gpu:
            per_rank = given.in_rank.sum(0, dtype=torch.int32)
            per_node = _tokens_of_nodes(views, given.in_rank)
            _check_same(call, given, TokenLayout(per_rank, per_node, None, given.in_rank))
        return _dispatch_without_experts(views, rows, scale_dims, given, options)
    routing = _agreed(views, routing, given, num_experts, call, same=bool(options.num_experts))
    native = _into_rows(num_worst_tokens) if num_worst_tokens else None
    most = _most_tokens(views, num_tokens, num_worst_tokens, call) if num_worst_tokens else ANY_NUM_TOKENS
    top_k = routing.topk_idx.shape[1]
    try:
        view = views.of(num_experts, top_k, hidden, most)
        sent = view.dispatch(rows, routing, options=native, num_sms=options.num_sms)
    except TokenferryError as error:
        if isinstance(error, CapacityError) and not views.on_gpu:  # where it may be that of an earlier call
            raise _too_few(call, num_worst_tokens, error) from None
        V1.put(error, call, views, num_experts=num_experts)
        raise
    recv_idx, recv_weights = sent.topk_idx, sent.topk_weights
    if num_worst_tokens:
        _clear_tail(recv_idx, recv_weights, sent.plan.src_counts)
    counts = aligned(sent.host_counts or (), options.expert_alignment)
    handle = _handle(views, sent.plan, given.in_rank, num_experts, top_k)
    return from_native(sent.x, scale_dims), recv_idx, recv_weights, counts, handle


def dispatch_again(views: Views, x: Rows, handle: object, num_sms: int | None) -> Rows:
    """Send new rows to where the rows of ``handle`` went, as `ExpertGroup.redispatch`. Collective."""
    call = "Buffer.dispatch"
    known = checked(handle, call)
    rows, scale_dims = to_native(call, x)
    try:
        view = views.of(known.num_experts, known.top_k, width(rows), ANY_NUM_TOKENS)
        sent = view.redispatch(rows, known.plan, num_sms=num_sms)
    except TokenferryError as error:
        V1.put(error, call, views)
        raise
    return from_native(sent.x, scale_dims)


def combine(
    views: Views, x: Tensor, handle: object, topk_weights: Tensor | None, bias: object, num_sms: int | None
) -> tuple[Tensor, Tensor | None]:
    """Add up rows on the ranks of their tokens, as `ExpertGroup.combine`. Collective.

    Raises:
        ArgumentError: ``bias`` is neither a tensor nor a tuple of exactly two.
        PlanError, ShapeError, MismatchError, PeerTimeout, ClosedError: as `ExpertGroup.combine`.
    """
    call = "Buffer.combine"
    known, device = checked(handle, call), views.device
    plan = known.plan
    if not (
        type(x) is Tensor
        and x.ndim == 2
        and not x.is_nested
        and x.shape[0] == plan.num_delivered
        and x.device == device
        and x.is_contiguous()
    ):
        Checks(call, device).given("the handle", N=plan.num_delivered).tensor("x", x, "N H", None)
    biases = bias if isinstance(bias, tuple) else () if bias is None else (bias,)
    if not all(isinstance(one, Tensor) for one in biases) or (isinstance(bias, tuple) and len(bias) != 2):
        given = f"a tuple of {len(bias)}" if isinstance(bias, tuple) else type(bias).__name__
        raise ArgumentError(
            f"{call}: bias: expected None, a tensor [T, H] or a tuple of two tensors, got {given}; pass one of these"
        )
    try:
        view = views.of(known.num_experts, known.top_k, x.shape[1], ANY_NUM_TOKENS)
        done = view.combine(x, plan, topk_weights=topk_weights, bias=biases or None, num_sms=num_sms)
    except TokenferryError as error:
        renamed = {} if isinstance(bias, tuple) else {"bias[0]": "bias"}
        if not known.routed:
            renamed["the handle"] = "the handle, whose dispatch had no topk_idx, so that there is a slot for each rank"
        V1.put(error, call, views, renamed=renamed)
        raise
    return done.x, done.topk_weights


def checked(handle: object, call: str) -> Handle:
    """Return a handle.

    Raises:
        PlanError: the handle does not come from `Buffer.dispatch`.
    """
    if isinstance(handle, Handle):
        return handle
    raise PlanError(
        f"{call}: handle: expected the one that tokenferry's Buffer.dispatch returned, got {type(handle).__name__}; "
        "pass it on as it is"
    )


def _dispatch_without_experts(
    views: Views, rows: Tensor | Quantized, scale_dims: int, given: TokenLayout, options: Options
) -> tuple[Rows, None, None, list[int], Handle]:
    """Send rows without expert ids: one expert stands for all those of a rank; their counts are sent separately."""
    group = views.group
    R = group.num_ranks
    ranks = torch.arange(R, device=group.device, dtype=torch.int64)
    routing = Routing(torch.where(given.in_rank, ranks, -1))
    assert given.per_expert is not None
    local = given.per_expert.to(torch.int32).reshape(R, -1)
    padded = torch.nn.functional.pad(local, (0, -local.shape[1] % 4))
    counts = Quantized(padded.contiguous(), padded.new_empty((R, 0)))
    step = WITHOUT_EXPERTS
    try:
        sent = views.of(R, R, width(rows), ANY_NUM_TOKENS).dispatch(rows, routing, num_sms=options.num_sms)
        step = TOTALS
        swapped = views.of(R, 1, padded.shape[1], R).dispatch(counts, Routing(ranks.unsqueeze(1)))
    except TokenferryError as error:
        V1.put(error, "Buffer.dispatch", views, step)
        raise
    assert isinstance(swapped.x, Quantized)
    totals = swapped.x.data.sum(0)[: local.shape[1]].tolist()
    counts_list = aligned(totals, options.expert_alignment)
    handle = _handle(views, sent.plan, given.in_rank, R, R, routed=False)
    return from_native(sent.x, scale_dims), None, None, counts_list, handle


def _handle(views: Views, plan: Plan, in_rank: Tensor, num_experts: int, top_k: int, *, routed: bool = True) -> Handle:
    """Return a handle in DeepEP's form for one node or for several."""
    kind = Handle if len(views.nodes) == 1 else InternodeHandle
    return kind(plan, in_rank, views.rank, num_experts, top_k, routed)


@functools.lru_cache(maxsize=256)
def _into_rows(capacity: int) -> DispatchOptions:
    """Return the options of a dispatch into so many rows, whose counts stay on the device."""
    return DispatchOptions(counts="device", capacity=capacity)


def _clear_tail(topk_idx: Tensor | None, topk_weights: Tensor | None, src_counts: Tensor) -> None:
    """Set ids to -1 and weights to 0 in the rows past those received, which were undefined, and which no call reads."""
    assert topk_idx is not None
    rows = torch.arange(topk_idx.shape[0], device=topk_idx.device, dtype=torch.int64)
    tail = (rows >= src_counts.sum()).unsqueeze(1)
    topk_idx.masked_fill_(tail, -1)
    if topk_weights is not None:
        topk_weights.masked_fill_(tail, 0.0)


def _agreed(views: Views, routing: Routing, given: TokenLayout, num_experts: int, call: str, *, same: bool) -> Routing:
    """Return the routing that agrees with both ``topk_idx`` and ``is_token_in_rank``.

    DeepEP routes by ``is_token_in_rank``: if it leaves out a rank, slots of that rank are dropped. A rank that no slot
    of the token names cannot be added. On a GPU that is not checked, since the host would have to wait.
    """
    index, in_rank, group = routing.topk_idx, given.in_rank, views.group
    weights = None if routing.topk_weights is None else detached(routing.topk_weights)
    if same and views.on_gpu and in_rank.shape[0] == index.shape[0]:
        return routing if weights is routing.topk_weights else Routing(index, weights)
    if not _looks_like_routing(index, group.device) or in_rank.shape[0] != index.shape[0]:
        Checks(call, group.device).given("x", T=in_rank.shape[0]).tensor("topk_idx", index, "T K", INDICES)
    if not views.on_gpu:
        Checks(call, group.device).experts("topk_idx", index, num_experts)
    kept = group._restricted(index, in_rank, num_experts)
    if views.on_gpu:
        return Routing(kept, weights)
    expected = layout_of(views, kept, num_experts, call)
    extra = in_rank & ~expected.in_rank
    if extra.any():
        token, rank = extra.nonzero()[0].tolist()
        raise ArgumentError(
            f"{call}: is_token_in_rank[{token}, {rank}] is True, but topk_idx[{token}] = {index[token].tolist()} names "
            f"no expert of rank {rank}; take both from the same get_dispatch_layout"
        )
    _check_same(call, given, expected)
    return Routing(kept, weights)


def _looks_like_routing(value: object, device: torch.device) -> bool:
    """Return whether a value is certainly a contiguous ``[T, K]`` of indices; see `fits`."""
    if not isinstance(value, Tensor) or value.ndim != 2 or value.is_nested:
        return False
    return fits(value, value.shape, INDICES, device)


def _most_tokens(views: Views, num_tokens: int, num_worst_tokens: int, call: str) -> int:
    """Return M of a dispatch into a fixed number of rows, the same on all ranks.

    DeepEP requires rows for the worst case: R times the tokens of a rank. The CPU backend accepts fewer, since it knows
    in time whether the rows fit. On a GPU the host would have to wait, which the argument exists to avoid.

    Raises:
        CapacityError: ``num_worst_tokens`` is below T, or on a GPU below R times T.
    """
    R = views.group.num_ranks
    if not views.on_gpu:
        if num_tokens > num_worst_tokens:
            raise CapacityError(
                f"{call}: num_worst_tokens={num_worst_tokens}: expected at least the T={num_tokens} tokens of this "
                "rank; pass R times the most tokens of any rank"
            )
        return num_worst_tokens
    if num_tokens * R > num_worst_tokens:
        raise CapacityError(
            f"{call}: num_worst_tokens={num_worst_tokens} holds {num_worst_tokens // R} tokens from each of {R} ranks, "
            f"got T={num_tokens}; pass at least R times the most of any rank"
        )
    return max(1, num_worst_tokens // R)


def _too_few(call: str, num_worst_tokens: int, error: CapacityError) -> CapacityError:
    """Return the error of a call on CPUs, whose capacity and M are ``num_worst_tokens``: it names that."""
    _, capacity, found = str(error).partition("options.capacity: ")
    if not capacity:
        return error
    found = found.partition(";")[0]
    return CapacityError(
        f"{call}: num_worst_tokens={num_worst_tokens} holds too few rows: {found}; pass R times the most tokens of any "
        "rank"
    )


def _check_layout(views: Views, given: TokenLayout, num_tokens: int, call: str) -> int:
    """Check the shapes and dtypes of the tensors of `get_dispatch_layout`, and return E."""
    R, device, per_expert = views.group.num_ranks, views.group.device, given.per_expert
    if not (
        given.per_node is None
        and type(per_expert) is Tensor
        and fits(per_expert, (per_expert.numel(),), INDICES, device)
        and fits(given.per_rank, (R,), INDICES, device)
        and fits(given.in_rank, (num_tokens, R), _BOOL, device)
    ):
        check = Checks(call, device).given("the group", R=R, nodes=len(views.nodes)).given("x", T=num_tokens)
        check.tensor("num_tokens_per_rank", given.per_rank, "R", INDICES)
        check.tensor("is_token_in_rank", given.in_rank, "T R", _BOOL)
        per_expert = check.tensor("num_tokens_per_expert", per_expert, "E", INDICES)
        if given.per_node is not None:
            check.tensor("num_tokens_per_rdma_rank", given.per_node, "nodes", INDICES)
    try:
        views.of(per_expert.numel(), 1, 1, 1)
    except ConfigError as error:
        V1.put(error, call, views, renamed={"num_experts": "num_tokens_per_expert: E"})
        raise
    return per_expert.numel()


def _check_same(call: str, given: TokenLayout, expected: TokenLayout) -> None:
    """Raise ArgumentError if a count is not the one that follows from the routing."""
    for name, actual, wanted in (
        ("num_tokens_per_rank", given.per_rank, expected.per_rank),
        ("num_tokens_per_rdma_rank", given.per_node, expected.per_node),
        ("num_tokens_per_expert", given.per_expert, expected.per_expert),
    ):
        if actual is None or wanted is None or torch.equal(actual.long(), wanted.long()):
            continue
        place = int((actual.long() != wanted.long()).nonzero()[0])
        raise ArgumentError(
            f"{call}: {name}[{place}]: expected {int(wanted[place])}, which follows from the routing, got "
            f"{int(actual[place])}; pass what get_dispatch_layout returned for it"
        )


def _tokens_of_nodes(views: Views, in_rank: Tensor) -> Tensor:
    """Return ``[nodes]`` int32: the tokens for each node; a token counts once."""
    return torch.stack([in_rank[:, list(ranks)].any(1).sum(dtype=torch.int32) for ranks in views.nodes])
