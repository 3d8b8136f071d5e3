"""`EPBuffer`: the API of DeepEP 2.5 for Mixture-of-Experts. Every method takes DeepEP's arguments in its order.

It has the calls of `tokenferry.compat.deep_ep.elastic.ElasticBuffer`, whose module lists the arguments that concern
hardware, without ``num_cpu_bytes`` and ``previous_event_before_epilogue``. These are new in DeepEP 2.5:

================================================== ==============================================================
argument or method                                 effect in tokenferry
================================================== ==============================================================
defer_epilogue                                     the results come from `EventOverlap.wait`. They are ready when
                                                   the communication stream is: no part of a call is left for the
                                                   wait. With ``do_cpu_sync`` the host waits for counts in the call
do_handle_copy                                     False in DeepEP 2.5, where True is an error; here True copies
lb_allocation_plan_or_num_bytes                    `UnsupportedError` unless 0 or None: there is no memory for
                                                   redundant experts
lb_prefetch_weights, lb_reduce_grads,              `UnsupportedError`
lb_get_theoretical_num_sms
================================================== ==============================================================
"""

from __future__ import annotations

from typing import NoReturn

import torch.distributed as dist
from torch import Tensor

from tokenferry.ambient import methods_not_compiled, without_grad
from tokenferry.checks import check_flags
from tokenferry.compat.deep_ep.arguments import Rows, check_integer, refuse
from tokenferry.compat.deep_ep.elastic_arguments import Arguments, Returned
from tokenferry.compat.deep_ep.elastic_handle import EPHandle
from tokenferry.compat.deep_ep.elastic_streams import ElasticWhen, Event
from tokenferry.compat.deep_ep.expert_buffer import CPU_TIMEOUT_S, GPU_TIMEOUT_S, ExpertBuffer, Settings
from tokenferry.compat.deep_ep.utils.event import EventOverlap
from tokenferry.errors import ArgumentError, UnsupportedError

DISPATCH, COMBINE = "EPBuffer.dispatch", "EPBuffer.combine"
_NO_REDUNDANCY = "give each expert to one rank, and leave it out"

Dispatched = tuple[Rows, Tensor | None, Tensor | None, EPHandle]
"""What `EPBuffer.dispatch` delivers, besides its event."""


@methods_not_compiled
class EPBuffer(ExpertBuffer):
    """R ranks that send tokens to experts, with the interface of DeepEP 2.5's `EPBuffer`.

    Contract:
        As `tokenferry.compat.deep_ep.elastic.ElasticBuffer`.

    Args:
        group: Any process group (on the CPU backend: one that supports CPU tensors), or None for a group of one rank.
            TOKENFERRY_BACKEND chooses the backend.
        num_bytes: Memory for rows, a multiple of 2 MiB; None: what `get_buffer_size_hint` says.
        num_max_tokens_per_rank: M of calls that give none.
        hidden: H, from which the memory follows; 0: not known.
        num_topk: K, likewise.
        use_fp8_dispatch: A hint without effect.
        lb_allocation_plan_or_num_bytes: Not supported; must be 0 or None.
        deterministic: A hint without effect.
        allow_hybrid_mode: A hint without effect.
        allow_multiple_reduction: Allow that sums are rounded more than once.
        prefer_overlap_with_compute: A hint without effect.
        sl_idx: One node: a hint without effect. Several: a service level other than 0 and 3 must be that of NCCL_IB_SL.
        num_allocated_qps: A hint without effect.
        num_cpu_timeout_secs: Seconds that a wait for a peer may take.
        num_gpu_timeout_secs: The same; the smaller one counts.
        explicitly_destroy: Allow `destroy`. If False, everything is freed together with the object.

    Its attributes are those of `ExpertBuffer`.

    Raises:
        UnsupportedError: ``lb_allocation_plan_or_num_bytes`` was given, or a variable of the environment or
            ``sl_idx`` asks for what cannot be honoured across nodes.
        ConfigError: a variable of the environment cannot be parsed.
        ArgumentError: a size or timeout is wrong, or there is neither ``num_bytes`` nor ``num_max_tokens_per_rank``.
        BackendUnavailable: no backend runs on this group; gives the reason.
        PeerTimeout: a rank did not answer.
    """

    _NAME = "EPBuffer"

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_bytes: int | None = None,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        lb_allocation_plan_or_num_bytes: object = 0,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int | None = None,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = CPU_TIMEOUT_S,
        num_gpu_timeout_secs: int = GPU_TIMEOUT_S,
        explicitly_destroy: bool = False,
    ) -> None:
        refuse(self._NAME, _NO_REDUNDANCY, lb_allocation_plan_or_num_bytes=lb_allocation_plan_or_num_bytes)
        settings = Settings(
            num_bytes=num_bytes,
            num_max_tokens_per_rank=num_max_tokens_per_rank,
            hidden=hidden,
            num_topk=num_topk,
            use_fp8_dispatch=use_fp8_dispatch,
            deterministic=deterministic,
            allow_hybrid_mode=allow_hybrid_mode,
            allow_multiple_reduction=allow_multiple_reduction,
            prefer_overlap_with_compute=prefer_overlap_with_compute,
            sl_idx=sl_idx,
            num_allocated_qps=num_allocated_qps,
            num_cpu_timeout_secs=num_cpu_timeout_secs,
            num_gpu_timeout_secs=num_gpu_timeout_secs,
            explicitly_destroy=explicitly_destroy,
        )
        super().__init__(group, settings)

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 0,
        sm_write_gbs: float = 0,
    ) -> int:
        """Return how many SMs both directions can use: even, at least 4, and no more than there are; on the CPU 20.

        Args:
            num_experts: E.
            num_topk: K.
            num_scaleout_topk: Does not change the result, which follows from measurements.
            rdma_gbs: The same.
            nvlink_gbs: The same.
            sm_read_gbs: The same.
            sm_write_gbs: The same.

        Raises:
            ArgumentError: a size is not a positive integer, or another argument no number of at least 0.
            ConfigError: CUDA: E is not a multiple of R.
        """
        return self._advised_num_sms(
            num_experts,
            num_topk,
            num_scaleout_topk,
            rdma_gbs=rdma_gbs,
            nvlink_gbs=nvlink_gbs,
            sm_read_gbs=sm_read_gbs,
            sm_write_gbs=sm_write_gbs,
        )

    @without_grad
    def dispatch(
        self,
        x: Rows,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Event = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = False,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
        defer_epilogue: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, EPHandle, EventOverlap] | EventOverlap:
        """Send every token to each rank that holds one of its experts. Collective.

        Args:
            x: ``[T, H]``, or rows with scales, ``([T, H], [T, P])``; scales of four bytes each and any strides.
            topk_idx: ``[T, K]`` int64 or int32 in ``[-1, E)``; -1: slot unused. None with a handle.
            topk_weights: ``[T, K]`` float32 to send with the rows, or None.
            cumulative_local_expert_recv_stats: ``[L]`` int32 to add the counts to, or None.
            num_experts: E, a multiple of R; may be left out with a handle.
            num_max_tokens_per_rank: M, the same on all ranks; None: that of the constructor or the handle.
            expert_alignment: A; None: 1, or that of the handle.
            num_sms: SMs that the call may occupy; 0: the library's choice, with a handle its number.
            num_qps: A hint without effect.
            previous_event: Event to wait for, or None; needs ``allocate_on_comm_stream``.
            async_with_compute_stream: Return an event that can be waited for.
            allocate_on_comm_stream: Any value is correct: results belong to both streams.
            handle: Handle of an earlier call, to send the rows to the same places.
            do_handle_copy: Keep a copy of ``topk_idx`` in the handle instead of the tensor itself.
            do_cpu_sync: Wait for the counts, and allocate as many rows as arrive; None: unless there is a handle.
            do_expand: Deliver a row for each (token, local expert), grouped by expert; with a handle as at first.
            do_zero_padding: Fill with zeros the rows and weights between each expert's count and the next multiple of
                A; needs ``do_expand``.
            use_tma_aligned_col_major_sf: Deliver scales with strides ``(1, rows rounded up to 4)``.
            defer_epilogue: Return the event alone, whose `EventOverlap.wait` returns the results; needs
                ``async_with_compute_stream``.

        Returns:
            (``recv_x``, ``recv_topk_idx``, ``recv_topk_weights``, handle, event), as `ElasticBuffer.dispatch`; or the
            event, whose first wait returns the first four.

        Raises:
            ArgumentError: arguments are missing or contradict each other; names them.
            ShapeError, RoutingError, CapacityError, PlanError, ConfigError, MismatchError, PeerTimeout, ClosedError: as
                `ExpertGroup.dispatch`.
        """
        self._open(DISPATCH)
        _check_deferral(DISPATCH, defer_epilogue, async_with_compute_stream)
        when = ElasticWhen(previous_event, None, async_with_compute_stream, allocate_on_comm_stream)
        check_integer(DISPATCH, "num_qps", num_qps, 0)
        given = Arguments(
            DISPATCH,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            cumulative_local_expert_recv_stats=cumulative_local_expert_recv_stats,
            num_experts=num_experts,
            num_max_tokens_per_rank=num_max_tokens_per_rank,
            expert_alignment=expert_alignment,
            num_sms=num_sms,
            do_handle_copy=do_handle_copy,
            do_cpu_sync=do_cpu_sync,
            do_expand=do_expand,
            do_zero_padding=do_zero_padding,
            use_tma_aligned_col_major_sf=use_tma_aligned_col_major_sf,
        )
        done, event = self._dispatch(x, handle, given, when)
        if not defer_epilogue:
            return done.x, done.topk_idx, done.topk_weights, done.handle, event

        def hand_over() -> Dispatched:
            self._lane.hand_over(done)
            return done.x, done.topk_idx, done.topk_weights, done.handle

        event.register_hook_after_wait(hand_over)
        return event

    @without_grad
    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Event = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        defer_epilogue: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap] | EventOverlap:
        """Add up the rows of each token: biases first, then rank by rank, in float32, rounded once. Collective.

        Args:
            x: ``[rows, H]``: one row for each that `dispatch` has allocated; those that hold nothing are not read. Gate
                weights are not applied.
            handle: Handle of a `dispatch`; may be used again.
            topk_weights: float32, ``[rows, K]``, or expanded ``[rows]``: the weight of each slot is returned from the
                rank that holds its expert. None: none is returned.
            bias: A tensor ``[T, H]``, a tuple of two, or None.
            num_sms: SMs that the call may occupy; 0: as the dispatch.
            num_qps: A hint without effect.
            previous_event: Event to wait for, or None; needs ``allocate_on_comm_stream``.
            async_with_compute_stream: Return an event that can be waited for.
            allocate_on_comm_stream: Any value is correct: results belong to both streams.
            defer_epilogue: Return the event alone, whose `EventOverlap.wait` returns the results; needs
                ``async_with_compute_stream``.

        Returns:
            (``combined_x`` ``[T, H]``, zeros or biases for tokens without experts; ``combined_topk_weights`` ``[T, K]``
            or None, 0 for unused slots; event); or the event, whose first wait returns the first two.

        Raises:
            ArgumentError, ShapeError, PlanError, MismatchError, PeerTimeout, ClosedError: as `ExpertGroup.combine`.
        """
        self._open(COMBINE)
        _check_deferral(COMBINE, defer_epilogue, async_with_compute_stream)
        when = ElasticWhen(previous_event, None, async_with_compute_stream, allocate_on_comm_stream)
        check_integer(COMBINE, "num_qps", num_qps, 0)
        rounds_once = not self.allow_multiple_reduction
        returned = Returned(COMBINE, x, topk_weights, bias, num_sms, rounds_once=rounds_once)
        done, event = self._combine(handle, returned, when)
        if not defer_epilogue:
            return *done, event

        def hand_over() -> tuple[Tensor, Tensor | None]:
            self._lane.hand_over(done)
            return done

        event.register_hook_after_wait(hand_over)
        return event

    # ------------------------------------------------------------------ redundant experts

    def lb_prefetch_weights(self, *_: object, **__: object) -> NoReturn:
        """Raise UnsupportedError: no rank holds weights of another one's experts."""
        _refuse_redundancy("lb_prefetch_weights")

    def lb_reduce_grads(self, *_: object, **__: object) -> NoReturn:
        """Raise UnsupportedError: no rank holds gradients of another one's experts."""
        _refuse_redundancy("lb_reduce_grads")

    def lb_get_theoretical_num_sms(self) -> NoReturn:
        """Raise UnsupportedError: the calls that it advises about are not there."""
        _refuse_redundancy("lb_get_theoretical_num_sms")


def _check_deferral(call: str, defer_epilogue: bool, asynchronous: bool) -> None:
    if not (type(defer_epilogue) is type(asynchronous) is bool):
        check_flags(call, defer_epilogue=defer_epilogue, async_with_compute_stream=asynchronous)
    if defer_epilogue and not asynchronous:
        raise ArgumentError(
            f"{call}: defer_epilogue: needs async_with_compute_stream=True, as in DeepEP, since the event returns the "
            "results; pass both, or leave it out"
        )


def _refuse_redundancy(method: str) -> NoReturn:
    raise UnsupportedError(
        f"EPBuffer.{method}: there are no copies of experts on other ranks; give each expert to one rank"
    )
