"""DeepEP's low-latency mode on an `ExpertGroup`.

A *handle* is a sequence of six: DeepEP's five elements, and the `DecodePlan`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenferry.ambient import methods_not_compiled, not_compiled
from tokenferry.api import ExpertGroup
from tokenferry.checks import INDICES, Checks, check_plain, fits, stands_for_others
from tokenferry.compat.deep_ep.arguments import check_sizes, detached
from tokenferry.compat.deep_ep.dialects import CLEAN, V1
from tokenferry.compat.deep_ep.handles import HandleBase
from tokenferry.compat.deep_ep.views import Views
from tokenferry.errors import ArgumentError, CapacityError, ConfigError, PlanError, ShapeError, TokenferryError
from tokenferry.types import DecodePlan, DecodeStats, Quantized, Routing, Scale

Hook = Callable[[], None]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LOGFMT_COLUMNS = 128
_WEIGHTS = (torch.float32,)


@dataclass(slots=True, eq=False)
@methods_not_compiled
class Handle(HandleBase):
    """The handle of a `dispatch`.

    Its elements are: ``src_token`` ``[L, R*M]`` int32; ``src_range`` ``[L, R]`` int64; M; H; E; the plan.

    Attributes:
        plan: The plan of the dispatch.
        max_tokens: M of the dispatch.
        hidden: H of the dispatch.
        num_experts: E of the dispatch.
        topk_idx: CPU: a copy of the routing, for comparison. CUDA: None, since the host would have to wait to compare.
        combine_buffer: The tensor that zero-copy combine reads; None until it is requested.
    """

    _NUM_ELEMENTS: ClassVar[int] = 6

    plan: DecodePlan
    max_tokens: int
    hidden: int
    num_experts: int
    topk_idx: Tensor | None
    combine_buffer: Tensor | None = None

    def managed_by_torch(self) -> tuple[Tensor | None, ...]:
        """See `HoldsTensors`."""
        return (*self.plan._managed_by_torch(), self.combine_buffer)

    def _element(self, place: int) -> Any:  # noqa: ANN401 - see HandleBase
        plan = self.plan
        if place == 0:
            return plan.src_token
        return plan.src_range if place == 1 else (self.max_tokens, self.hidden, self.num_experts, plan)[place - 2]


@dataclass(slots=True, eq=False)
class DispatchArguments:
    """The arguments of `dispatch` besides rows and routing.

    Attributes:
        max_tokens: The most tokens of any rank, M.
        num_experts: Number of experts, E.
        quantize: Format of the scales of rows cast to FP8; None: rows are not cast.
        received: ``[L]`` int32 counters, or None.
        wait_ns: ``[R]`` int64 counters, or None.
        return_hook: Whether the caller receives with a hook.
    """

    max_tokens: int
    num_experts: int
    quantize: Scale | None
    received: Tensor | None
    wait_ns: Tensor | None
    return_hook: bool


@dataclass(slots=True, eq=False)
class CombineArguments:
    """The arguments of `combine` besides rows, routing and handle.

    Attributes:
        use_logfmt: Send rows as LogFMT-10.
        zero_copy: Read `Handle.combine_buffer` instead of the rows.
        out: ``[T, H]`` to write to, or None.
        wait_ns: ``[R]`` int64 counters, or None.
        return_hook: Whether the caller receives with a hook.
    """

    use_logfmt: bool
    zero_copy: bool
    out: Tensor | None
    wait_ns: Tensor | None
    return_hook: bool


def scale_format(use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> Scale | None:
    """Return the format of the scales of rows cast to FP8; None: rows are not cast.

    Raises:
        ArgumentError: ``use_ue8m0`` without ``round_scale``.
    """
    if not use_fp8:
        return None
    if use_ue8m0 and not round_scale:
        raise ArgumentError(
            "Buffer.low_latency_dispatch: use_ue8m0: needs round_scale=True, since only powers of two have that form"
        )
    return Scale.UE8M0 if use_ue8m0 else Scale.POWER_OF_TWO if round_scale else Scale.FLOAT32


def dispatch(
    views: Views, x: Tensor, topk_idx: Tensor, given: DispatchArguments
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, Handle, Hook | None]:
    """Send tokens to their experts. Collective.

    Raises:
        ArgumentError: M or E is not a positive integer.
        CapacityError: T > M.
        ShapeError, RoutingError, ConfigError, MismatchError, PeerTimeout, ClosedError: as
        `ExpertGroup.decode_dispatch`.
    """
    call, max_tokens, num_experts = "Buffer.low_latency_dispatch", given.max_tokens, given.num_experts
    if not (
        isinstance(x, Tensor)
        and isinstance(topk_idx, Tensor)
        and x.ndim == topk_idx.ndim == 2
        and not (x.is_nested or topk_idx.is_nested)
    ):
        _check_dispatch(views.group, x, topk_idx, given)
    hidden = x.shape[1]
    try:
        view = views.of(num_experts, topk_idx.shape[1], hidden, max_tokens)
    except TokenferryError as error:
        if isinstance(error, ConfigError):  # it has the names of `MoeShape`
            check_sizes(call, num_max_dispatch_tokens_per_rank=max_tokens, num_experts=num_experts)
        V1.put(error, call, views)
        raise
    kept = None
    if not views.on_gpu and not stands_for_others(topk_idx):
        kept = topk_idx.clone()  # the caller may overwrite its tensor before combine
    uncounted = given.received is None and given.wait_ns is None
    try:
        sent = view.decode_dispatch(
            detached(x),
            Routing(topk_idx if kept is None else kept),
            quantize=given.quantize,
            stats=None if uncounted else DecodeStats(given.received, given.wait_ns),
            return_hook=given.return_hook,
        )
    except TokenferryError as error:
        if isinstance(error, ShapeError | CapacityError):
            _check_dispatch(views.group, x, topk_idx, given)
        V1.put(error, call, views, num_experts=num_experts)
        raise
    rows = (sent.x.data, sent.x.scale) if isinstance(sent.x, Quantized) else sent.x
    handle = Handle(sent.plan, max_tokens, hidden, num_experts, kept)
    return rows, sent.expert_counts, handle, partial(_receive, views, call, sent.hook) if given.return_hook else None


def _check_dispatch(group: ExpertGroup, x: Tensor, topk_idx: Tensor, given: DispatchArguments) -> None:
    """Report what `ExpertGroup.decode_dispatch` reports by other names.

    Raises:
        ShapeError, CapacityError: an argument is wrong; names it.
    """
    call, R = "Buffer.low_latency_dispatch", group.num_ranks
    check = Checks(call, group.device)
    check.tensor("x", x, "T H", FLOATS)
    check.tensor("topk_idx", topk_idx, "T K", INDICES)
    if x.shape[0] > given.max_tokens:
        raise CapacityError(
            f"{call}: x: T={x.shape[0]} rows exceed num_max_dispatch_tokens_per_rank={given.max_tokens}; send fewer, "
            "or agree on more"
        )
    check.given("num_experts", EL=given.num_experts // R).given("the group", R=R)
    if given.received is not None:
        check.tensor("cumulative_local_expert_recv_stats", given.received, "EL", (torch.int32,))
    if given.wait_ns is not None:
        check.tensor("dispatch_wait_recv_cost_stats", given.wait_ns, "R", (torch.int64,))


def combine(
    views: Views, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: object, given: CombineArguments
) -> tuple[Tensor, Hook | None]:
    """Add up the experts' rows with their gate weights, on the ranks of their tokens. Collective.

    Raises:
        ArgumentError: ``topk_idx`` is not what was dispatched (CPU), ``zero_copy`` without the buffer for it, or
            ``zero_copy`` or ``use_logfmt`` with rows that are not bfloat16, or ``use_logfmt`` with H not a multiple
            of 128.
        PlanError: ``handle`` does not come from low_latency_dispatch, or belongs to another group.
        ShapeError, MismatchError, PeerTimeout, ClosedError: as `ExpertGroup.decode_combine`.
    """
    call = "Buffer.low_latency_combine"
    known = checked(handle, call)
    group, plan, hidden, top_k = views.group, known.plan, known.hidden, known.plan.topk_idx.shape[1]
    if (
        given.zero_copy
        or not (isinstance(x, Tensor) and isinstance(topk_weights, Tensor))
        or not fits(topk_idx, (plan.num_tokens, top_k), INDICES, group.device)
    ):
        _check_combine(group, x, topk_idx, topk_weights, known, given)
    if given.use_logfmt and (x.dtype != torch.bfloat16 or hidden % LOGFMT_COLUMNS):
        raise ArgumentError(
            f"{call}: use_logfmt: needs bfloat16 rows whose hidden size is a multiple of {LOGFMT_COLUMNS}, got "
            f"{x.dtype} with H={hidden}; pass False"
        )
    weights = detached(topk_weights)
    if known.topk_idx is None:  # the plan holds the tensor of the dispatch, which may since have been overwritten
        plan = plan._routed(topk_idx, weights)
    elif not _is_same_routing(group, topk_idx, known):
        raise ArgumentError(f"{call}: topk_idx: differs from the one that made the handle; pass the same to both calls")
    else:
        plan = plan._routed(plan.topk_idx, weights)
    if given.zero_copy:
        if x.dtype != torch.bfloat16:
            raise ArgumentError(f"{call}: x: with zero_copy rows are bfloat16, got {x.dtype}; pass zero_copy=False")
        if known.combine_buffer is None:
            raise ArgumentError(
                f"{call}: zero_copy: reads get_next_low_latency_combine_buffer(handle), which was not called for this "
                "handle; write the rows there first, or pass zero_copy=False"
            )
        x = known.combine_buffer
    try:
        view = views.of(known.num_experts, top_k, hidden, known.max_tokens)
        done = view.decode_combine(
            detached(x),
            plan,
            encoding="logfmt10" if given.use_logfmt else "same",
            out=given.out,
            stats=None if given.wait_ns is None else DecodeStats(None, given.wait_ns),
            return_hook=given.return_hook,
        )
    except TokenferryError as error:
        if isinstance(error, ShapeError):
            _check_combine(group, x, topk_idx, topk_weights, known, given)
        V1.put(error, call, views)
        raise
    return done.x, partial(_receive, views, call, done.hook) if given.return_hook else None


@not_compiled
def _receive(views: Views, call: str, receive: Hook) -> None:
    """Call a hook, and reword its errors for this API. One function for all hooks: `not_compiled` takes 1 us."""
    try:
        receive()
    except TokenferryError as error:
        V1.put(error, call, views)
        raise


def _check_combine(
    group: ExpertGroup, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Handle, given: CombineArguments
) -> None:
    """Report what `ExpertGroup.decode_combine` reports by other names, or does not look at.

    Raises:
        ShapeError: an argument is wrong; names it.
    """
    R, (num_tokens, top_k) = group.num_ranks, handle.plan.topk_idx.shape
    check = Checks("Buffer.low_latency_combine", group.device).given("the group", R=R)
    check.given("the handle", EL=handle.num_experts // R, rows=R * handle.max_tokens, H=handle.hidden)
    check.given("the handle", T=num_tokens, K=top_k)
    check.tensor("x", x, "EL rows H", FLOATS, contiguous=not given.zero_copy)
    check.tensor("topk_idx", topk_idx, "T K", INDICES)
    check.tensor("topk_weights", topk_weights, "T K", _WEIGHTS)
    if given.wait_ns is not None:
        check.tensor("combine_wait_recv_cost_stats", given.wait_ns, "R", (torch.int64,))


def _is_same_routing(group: ExpertGroup, topk_idx: Tensor, handle: Handle) -> bool:
    """Return whether these are the slots of the dispatch; those of masked ranks, which count for nothing, may be -1."""
    assert handle.topk_idx is not None
    check_plain("Buffer.low_latency_combine", "topk_idx", topk_idx)
    now, sent = topk_idx.long(), handle.topk_idx.long()
    if torch.equal(now, sent):
        return True
    owner = sent // (handle.num_experts // group.num_ranks)
    masked = torch.tensor(sorted(group.masked_ranks), dtype=torch.int64, device=group.device)
    return bool(((now == sent) | ((now == -1) & torch.isin(owner, masked))).all())


def meet(views: Views) -> None:
    """Wait for all ranks, and mask those that do not come, if the group may. Collective: a dispatch of no tokens."""
    group = views.group
    x = torch.empty(0, LOGFMT_COLUMNS, dtype=torch.bfloat16, device=group.device)
    nowhere = torch.empty(0, 1, dtype=torch.int64, device=group.device)
    try:
        views.of(group.num_ranks, 1, LOGFMT_COLUMNS, 1).decode_dispatch(x, Routing(nowhere))
    except TokenferryError as error:
        V1.put(error, CLEAN.name, views, CLEAN)
        raise


def combine_buffer(group: ExpertGroup, handle: object) -> Tensor:
    """Return ``[EL, R*M, H]`` bfloat16, which zero-copy combine reads; the same tensor for the same handle. Local."""
    known = checked(handle, "Buffer.get_next_low_latency_combine_buffer")
    if known.combine_buffer is None:
        # Any memory will do, since combine sends rows from anywhere.
        R = group.num_ranks
        shape = (known.num_experts // R, R * known.max_tokens, known.hidden)
        known.combine_buffer = torch.empty(shape, dtype=torch.bfloat16, device=group.device)
    return known.combine_buffer


def checked(handle: object, call: str) -> Handle:
    """Return a handle.

    Raises:
        PlanError: it is not one that `Buffer.low_latency_dispatch` returned.
    """
    if isinstance(handle, Handle):
        return handle
    raise PlanError(
        f"{call}: handle: expected the handle that Buffer.low_latency_dispatch of tokenferry returned, got "
        f"{type(handle).__name__}; pass it on as it is"
    )
