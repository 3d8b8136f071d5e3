"""`ElasticBuffer`: the API of DeepEP 2 for Mixture-of-Experts. Every method takes DeepEP's arguments in its order.

These arguments concern hardware, or do more than their names say; all others do what DeepEP documents:

================================================== ==============================================================
argument                                           effect in tokenferry
================================================== ==============================================================
num_bytes, and the sizes that it follows from      CUDA: the memory for rows that peers write or read, if it is more
                                                   than 2 GiB; TOKENFERRY_HEAP_MB overrides it. CPU: calls allocate
                                                   memory for rows as they need it
num_cpu_bytes                                      `UnsupportedError` unless 0: it is for DeepEP's Engram methods,
                                                   which are missing
use_fp8_dispatch                                   any value is correct: rows of combine, which are larger, decide
                                                   the sizes
deterministic                                      any value is correct: rows always have the same order
allow_multiple_reduction                           one node: any value is correct, since sums are float32 until the
                                                   end. Several nodes: False makes rows cross nodes in float32
allow_hybrid_mode, num_allocated_qps, num_qps,     any value is correct: there are no queue pairs, rows cross nodes
sequential                                         the same way in any mode, and a barrier has one part
sl_idx                                             one node: any value is correct. Several: `UnsupportedError` for a
                                                   service level other than 0 and the default, unless NCCL_IB_SL is it
prefer_overlap_with_compute                        any value is correct: more SMs than advised do not make calls
                                                   faster
num_cpu_timeout_secs, num_gpu_timeout_secs         the smaller one is the timeout of every wait for a peer; with both
                                                   defaults TOKENFERRY_TIMEOUT_S
num_sms                                            CUDA: SMs that a call may occupy; 0: the library's choice, in
                                                   combine and cached dispatch the number of the handle. CPU: checked
num_max_tokens_per_rank                            may differ from call to call, the same on all ranks
use_tma_aligned_col_major_sf                       the layout of received scales; no effect without scales
allocate_on_comm_stream                            any value is correct: results belong to both streams
================================================== ==============================================================

For tensors on a GPU, an index outside [-1, E) is detected by the next call if the host does not wait for counts.

Lifted limits: any R with E % R == 0 (also 1), any K, any H whose row is a multiple of 16 bytes, bfloat16, float16 and
float32 rows, int32 indices, experts that repeat in a row, and weights with an expanded combine in any mode.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from tokenferry.ambient import methods_not_compiled, without_grad
from tokenferry.compat.deep_ep.arguments import Rows, check_integer, refuse
from tokenferry.compat.deep_ep.elastic_arguments import Arguments, Returned
from tokenferry.compat.deep_ep.elastic_handle import EPHandle
from tokenferry.compat.deep_ep.elastic_streams import ElasticWhen, Event
from tokenferry.compat.deep_ep.expert_buffer import CPU_TIMEOUT_S, GPU_TIMEOUT_S, ExpertBuffer, Settings
from tokenferry.compat.deep_ep.utils.event import EventOverlap

DISPATCH, COMBINE = "ElasticBuffer.dispatch", "ElasticBuffer.combine"


@methods_not_compiled
class ElasticBuffer(ExpertBuffer):
    """R ranks that send tokens to experts, with the interface of DeepEP 2's `ElasticBuffer`.

    Contract:
        Collective: the constructor, `dispatch`, `combine` and `barrier`; the rest is local, including `destroy`.
        Host: CPU: every call returns with its work done. CUDA: every call returns when its work is on its stream;
            `dispatch` with ``do_cpu_sync=True`` waits for the counts that it returns, without holding the GIL.
        Stream: CUDA: torch's current stream; with ``async_with_compute_stream=True`` the communication stream.
        CUDA graph: `combine`, and `dispatch` with ``do_cpu_sync=False`` or a handle.
        Gradient: none; results carry no graph. The backward of `dispatch` is `combine` with ``topk_weights``; that of
            `combine` is `dispatch` with the handle.

    Args:
        group: Any process group (on the CPU backend: one that supports CPU tensors), or None for a group of one rank.
            TOKENFERRY_BACKEND chooses the backend.
        num_bytes: Memory for rows, a multiple of 2 MiB; None: what `get_buffer_size_hint` says.
        num_cpu_bytes: Not supported; must be 0.
        num_max_tokens_per_rank: M of calls that give none.
        hidden: H, from which the memory follows; 0: not known.
        num_topk: K, likewise.
        use_fp8_dispatch: A hint without effect.
        deterministic: A hint without effect.
        allow_hybrid_mode: A hint without effect.
        allow_multiple_reduction: Allow that sums are rounded more than once; see the table of this module.
        prefer_overlap_with_compute: A hint without effect.
        sl_idx: One node: a hint without effect. Several: a service level other than 0 and 3 must be that of NCCL_IB_SL.
        num_allocated_qps: A hint without effect.
        num_cpu_timeout_secs: Seconds that a wait for a peer may take.
        num_gpu_timeout_secs: The same; the smaller one counts.
        explicitly_destroy: Allow `destroy`. If False, everything is freed together with the object.

    Its attributes are those of `ExpertBuffer`.

    Raises:
        UnsupportedError: ``num_cpu_bytes`` was given, or a variable of the environment or ``sl_idx`` asks for what
            cannot be honoured across nodes.
        ConfigError: a variable of the environment cannot be parsed.
        ArgumentError: a size or timeout is wrong, or there is neither ``num_bytes`` nor ``num_max_tokens_per_rank``.
        BackendUnavailable: no backend runs on this group; gives the reason.
        PeerTimeout: a rank did not answer.
    """

    _NAME = "ElasticBuffer"

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = CPU_TIMEOUT_S,
        num_gpu_timeout_secs: int = GPU_TIMEOUT_S,
        explicitly_destroy: bool = False,
    ) -> None:
        refuse(self._NAME, "leave it out; the methods that it is for are missing", num_cpu_bytes=num_cpu_bytes)
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
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
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
        previous_event_before_epilogue: Event = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
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
            previous_event_before_epilogue: Another event to wait for, or None.
            async_with_compute_stream: Return an event that can be waited for.
            allocate_on_comm_stream: Any value is correct: results belong to both streams.
            handle: Handle of an earlier call, to send the rows to the same places.
            do_handle_copy: Keep a copy of ``topk_idx`` in the handle instead of the tensor itself.
            do_cpu_sync: Wait for the counts, and allocate as many rows as arrive; None: unless there is a handle.
            do_expand: Deliver a row for each (token, local expert), grouped by expert; with a handle as at first.
            do_zero_padding: Fill with zeros the rows and weights between each expert's count and the next multiple of
                A; needs ``do_expand``.
            use_tma_aligned_col_major_sf: Deliver scales with strides ``(1, rows rounded up to 4)``.

        Returns:
            (``recv_x`` in the form of ``x``; ``recv_topk_idx`` ``[rows, K]`` local experts, -1 for those of other
            ranks, None if expanded; ``recv_topk_weights`` ``[rows, K]``, 0 for those of other ranks, or expanded
            ``[rows]``, None if none were sent; handle; event). ``rows``: the rows received, by source rank, then token;
            expanded by expert first, each of whose rows begin at a multiple of A. With ``do_cpu_sync=False`` as many
            as there can be, of which those behind the received ones are undefined. The handle shares
            ``recv_topk_idx``: while it is in use, change a copy, not the tensor in place.

        Raises:
            ArgumentError: arguments are missing or contradict each other; names them.
            ShapeError, RoutingError, CapacityError, PlanError, ConfigError, MismatchError, PeerTimeout, ClosedError: as
                `ExpertGroup.dispatch`.
        """
        self._open(DISPATCH)
        when = ElasticWhen(
            previous_event, previous_event_before_epilogue, async_with_compute_stream, allocate_on_comm_stream
        )
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
        return done.x, done.topk_idx, done.topk_weights, done.handle, event

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
        previous_event_before_epilogue: Event = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
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
            previous_event_before_epilogue: Another event to wait for, or None.
            async_with_compute_stream: Return an event that can be waited for.
            allocate_on_comm_stream: Any value is correct: results belong to both streams.

        Returns:
            (``combined_x`` ``[T, H]``, zeros or biases for tokens without experts; ``combined_topk_weights`` ``[T, K]``
            or None, 0 for unused slots; event).

        Raises:
            ArgumentError, ShapeError, PlanError, MismatchError, PeerTimeout, ClosedError: as `ExpertGroup.combine`.
        """
        self._open(COMBINE)
        when = ElasticWhen(
            previous_event, previous_event_before_epilogue, async_with_compute_stream, allocate_on_comm_stream
        )
        check_integer(COMBINE, "num_qps", num_qps, 0)
        rounds_once = not self.allow_multiple_reduction
        returned = Returned(COMBINE, x, topk_weights, bias, num_sms, rounds_once=rounds_once)
        (combined_x, weights), event = self._combine(handle, returned, when)
        return combined_x, weights, event
