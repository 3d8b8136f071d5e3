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
allow_hybrid_mode, sl_idx, num_allocated_qps,      any value is correct: there are no queue pairs, rows cross nodes
num_qps, sequential                                the same way in any mode, and a barrier has one part
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

import weakref
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.ambient import without_grad
from tokenferry.api import Connected, ExpertGroup
from tokenferry.compat.deep_ep import elastic_calls as calls
from tokenferry.compat.deep_ep.arguments import Rows, refuse
from tokenferry.compat.deep_ep.config import round_up
from tokenferry.compat.deep_ep.connect import connect
from tokenferry.compat.deep_ep.elastic_arguments import Arguments, Returned
from tokenferry.compat.deep_ep.elastic_calls import COMBINE, DISPATCH, check_integer
from tokenferry.compat.deep_ep.elastic_handle import CPU_NUM_SMS, EPHandle
from tokenferry.compat.deep_ep.elastic_streams import ElasticWhen, Event, run
from tokenferry.compat.deep_ep.streams import Lane, When
from tokenferry.compat.deep_ep.utils.event import EventHandle, EventOverlap
from tokenferry.compat.deep_ep.views import Views
from tokenferry.errors import ArgumentError, ClosedError
from tokenferry.types import DispatchOptions, Routing

_CPU_TIMEOUT_S, _GPU_TIMEOUT_S = 300, 100
_BYTES_UNIT = 2 << 20
_LEAST_HEAP_BYTES = 2 << 30
"""Least GPU memory for rows, as for `Buffer`: sizes of calls are not known before the calls."""
_UNKNOWN_TOP_K = 32
"""K of the sizes if it is not known, as in DeepEP."""
_TYPICAL_HIDDEN, _MANY_TOKENS = 7168, 4096
"""Sizes for which SMs are advised if the constructor got none."""


def get_physical_domain_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return the number of nodes and of ranks in each. Collective: it makes a group of tokenferry, and closes it."""
    made = ExpertGroup._with_heap(group, heap_bytes=_BYTES_UNIT)
    try:
        return made.topology.num_nodes, made.topology.ranks_per_node
    finally:
        made.close()


def get_logical_domain_size(group: dist.ProcessGroup | None, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """Return 1 and R: ranks of all nodes are addressed alike, whatever ``allow_hybrid_mode`` says. Local."""
    return 1, 1 if group is None else group.size()


class ElasticBuffer(Connected):
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
        sl_idx: A hint without effect.
        num_allocated_qps: A hint without effect.
        num_cpu_timeout_secs: Seconds that a wait for a peer may take.
        num_gpu_timeout_secs: The same; the smaller one counts.
        explicitly_destroy: Allow `destroy`. If False, everything is freed together with the object.

    Attributes:
        group: The process group.
        num_bytes: As given, or what the sizes need.
        num_max_tokens_per_rank: As given.
        rank_idx: This rank.
        num_ranks: R.
        num_scaleout_ranks: 1, the first number of `get_logical_domain_size`.
        num_scaleup_ranks: R, the second.
        scaleout_rank_idx: 0.
        scaleup_rank_idx: This rank.
        num_rdma_ranks: Number of nodes.
        num_nvlink_ranks: Ranks of a node.
        num_allocated_qps: As given.
        allow_hybrid_mode: As given.
        allow_multiple_reduction: As given.
        prefer_overlap_with_compute: As given.
        deterministic: As given.
        explicitly_destroy: As given.
        runtime: The native group; None after `destroy`.
        nccl_comm_handle: None: there is no communicator of NCCL.

    Raises:
        UnsupportedError: ``num_cpu_bytes`` was given, or a variable of the environment asks for what cannot be honoured
            across nodes.
        ConfigError: a variable of the environment cannot be parsed.
        ArgumentError: a size or timeout is wrong, or there is neither ``num_bytes`` nor ``num_max_tokens_per_rank``.
        BackendUnavailable: no backend runs on this group; gives the reason.
        PeerTimeout: a rank did not answer.
    """

    nccl_comm_handle = None

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
        num_cpu_timeout_secs: int = _CPU_TIMEOUT_S,
        num_gpu_timeout_secs: int = _GPU_TIMEOUT_S,
        explicitly_destroy: bool = False,
    ) -> None:
        call = "ElasticBuffer"
        refuse(call, "leave it out; the methods that it is for are missing", num_cpu_bytes=num_cpu_bytes)
        sizes = {"num_max_tokens_per_rank": num_max_tokens_per_rank, "hidden": hidden, "num_topk": num_topk}
        for name, value in (sizes | {"num_allocated_qps": num_allocated_qps}).items():
            check_integer(call, name, value, 0)
        if num_bytes is None and not num_max_tokens_per_rank:
            raise ArgumentError(f"{call}: expected num_bytes or num_max_tokens_per_rank, got neither; pass one of them")
        if num_bytes is not None and (type(num_bytes) is not int or num_bytes < 1 or num_bytes % _BYTES_UNIT):
            raise ArgumentError(
                f"{call}: num_bytes: expected a multiple of {_BYTES_UNIT} (2 MiB), got {num_bytes!r}; see "
                "get_buffer_size_hint"
            )
        if num_bytes is None and hidden:
            num_bytes = self.get_buffer_size_hint(group, num_max_tokens_per_rank, hidden, num_topk)
        self.num_bytes = num_bytes or _LEAST_HEAP_BYTES
        self._experts = connect(
            call,
            group,
            heap_bytes=max(self.num_bytes, _LEAST_HEAP_BYTES),
            timeout_s=_timeout_s(num_cpu_timeout_secs, num_gpu_timeout_secs),
        )
        self.group = group
        self.num_max_tokens_per_rank, self._hidden = num_max_tokens_per_rank, hidden
        self.num_allocated_qps = num_allocated_qps
        self.allow_hybrid_mode, self.allow_multiple_reduction = allow_hybrid_mode, allow_multiple_reduction
        self.prefer_overlap_with_compute, self.deterministic = prefer_overlap_with_compute, deterministic
        self.explicitly_destroy = explicitly_destroy
        self.rank_idx = self.scaleup_rank_idx = self._experts.rank
        self.num_ranks = self.num_scaleup_ranks = self._experts.num_ranks
        self.num_scaleout_ranks, self.scaleout_rank_idx = 1, 0
        self.num_rdma_ranks, self.num_nvlink_ranks = self.get_physical_domain_size()
        self._lane = Lane(self._experts.device)
        self._views = Views(self._experts)
        # Local, so that it is safe wherever the collector runs; at exit the process closes everything anyway.
        self._closing = weakref.finalize(self, self._experts.close)
        self._closing.atexit = False
        self.runtime: ExpertGroup | None = self._experts

    def destroy(self) -> None:
        """Free connections and memory; later calls raise ClosedError. Local, idempotent, never blocks.

        Raises:
            ArgumentError: the buffer was made with ``explicitly_destroy=False``.
        """
        if not self.explicitly_destroy:
            raise ArgumentError(
                "ElasticBuffer.destroy: explicitly_destroy=False frees by itself; make the ElasticBuffer with True"
            )
        self._closing()
        self.runtime = None

    # ------------------------------------------------------------------ small methods

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup | None,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Return a ``num_bytes`` for these sizes, a multiple of 2 MiB. Local and cheap.

        It holds the bfloat16 rows of five worst-case dispatches that are not expanded: rows received and rows to
        combine, both a second time while the next ones arrive, and one more set into which rows land. Expanded ones
        without host synchronisation may need up to K times as much: give ``num_bytes`` if calls raise CapacityError.

        Args:
            group: The process group, or None.
            num_max_tokens_per_rank: M.
            hidden: H.
            num_topk: K; 0: not known.
            use_fp8_dispatch: Does not change the result: combine sends bfloat16 rows in any case.
            allow_hybrid_mode: Does not change the result.
            allow_multiple_reduction: Does not change the result.

        Raises:
            ArgumentError: M or H is not positive.
        """
        call = "ElasticBuffer.get_buffer_size_hint"
        check_integer(call, "num_max_tokens_per_rank", num_max_tokens_per_rank, 1)
        check_integer(call, "hidden", hidden, 1)
        check_integer(call, "num_topk", num_topk, 0)
        row_bytes = 2 * hidden + 24 * (num_topk or _UNKNOWN_TOP_K) + 8  # data; weights, ids and places; source token
        num_rows = num_max_tokens_per_rank * (1 if group is None else group.size())
        return round_up(5 * num_rows * row_bytes, _BYTES_UNIT)

    @staticmethod
    def capture() -> EventHandle:
        """Return an event of the work submitted so far to torch's current stream."""
        return EventHandle()

    def get_comm_stream(self) -> torch.cuda.Stream | torch.cpu.Stream:
        """Return the stream of asynchronous calls: this buffer's own; on the CPU the current one."""
        return torch.cpu.current_stream() if self._lane.stream is None else self._lane.stream

    def get_physical_domain_size(self) -> tuple[int, int]:
        """Return the number of nodes, and of ranks in each."""
        topology = self._experts.topology
        return topology.num_nodes, topology.ranks_per_node

    def get_logical_domain_size(self) -> tuple[int, int]:
        """Return 1 and R: ranks of all nodes are addressed alike."""
        return self.num_scaleout_ranks, self.num_scaleup_ranks

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
            ConfigError: CUDA: E is not a multiple of R, or a size is not positive.
        """
        if self._experts.backend != "cuda":
            return CPU_NUM_SMS
        most_tokens = self.num_max_tokens_per_rank or _MANY_TOKENS
        sms = self._views.of(num_experts, num_topk, self._hidden or _TYPICAL_HIDDEN, most_tokens)._call_sms()
        assert sms is not None
        return max(4, max(sms.dispatch, sms.combine) // 2 * 2)

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Return 1: there are no queue pairs, and every number is as good."""
        check_integer("ElasticBuffer.get_theoretical_num_qps", "num_sms", num_sms, 0)
        return 1

    @without_grad
    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        """Wait for all ranks: on the CPU the host, on CUDA the current stream. Collective.

        Args:
            use_comm_stream: Wait on the communication stream, too.
            with_cpu_sync: CUDA: the host waits as well.
            sequential: A hint without effect.

        Raises:
            MismatchError, PeerTimeout, ClosedError: as `ExpertGroup.dispatch`.
        """
        call = "ElasticBuffer.barrier"
        self._open(call)
        # Nobody is done with a dispatch before all have begun it, even if there is nothing to send.
        nothing = torch.empty(0, 16, dtype=torch.uint8, device=self._experts.device)
        routing = Routing(torch.empty(0, 1, dtype=torch.int64, device=nothing.device))
        rows = calls.checked_rows(nothing, nothing.device)
        options = DispatchOptions(counts="device")

        def meet() -> None:
            self._views.of(self.num_ranks, 1, 16, 1).dispatch(rows, routing, options=options)

        _, event = self._lane.run(call, When(async_finish=use_comm_stream), (nothing, routing), meet)
        if event.event is not None:
            event.current_stream_wait()
        if with_cpu_sync:
            self._experts.synchronize()

    # ------------------------------------------------------------------ dispatch and combine

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
            as there can be, of which those behind the received ones are undefined.

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
        rows = calls.checked_rows(x, self._experts.device)
        if handle is not None:
            known = calls.checked_handle(DISPATCH, handle)
            calls.check_again(known, given)
            inputs: tuple[Any, ...] = (x, topk_weights, known)
            work = partial(calls.dispatch_again, self._views, x, rows, known, given)
        else:
            request = calls.resolved(self._experts, rows, given, self.num_max_tokens_per_rank)
            inputs = (x, topk_idx, topk_weights, cumulative_local_expert_recv_stats)
            work = partial(calls.dispatch, self._views, x, rows, request)
        done, event = run(self._lane, DISPATCH, when, inputs, work)
        if handle is None:
            done.handle.is_made_by(event.event)
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
        known = calls.checked_handle(COMBINE, handle)
        returned = Returned(x, topk_weights, bias, num_sms, rounds_once=not self.allow_multiple_reduction)
        calls.check_returned(self._experts.device, known, returned)
        inputs = (x, topk_weights, bias, known)
        (combined_x, weights), event = run(
            self._lane, COMBINE, when, inputs, partial(calls.combine, self._views, known, returned)
        )
        return combined_x, weights, event

    def _open(self, call: str) -> None:
        """Raise ClosedError after `destroy`, after an error that broke the group, and in a forked child."""
        if self.runtime is None:
            raise ClosedError(f"{call}: the ElasticBuffer was destroyed; make a new one")
        self._experts._ready(call)


def _timeout_s(cpu_s: int, gpu_s: int) -> float | None:
    """Return the timeout of a group; None: that of the environment, if both are the defaults.

    Raises:
        ArgumentError: a timeout is not positive.
    """
    check_integer("ElasticBuffer", "num_cpu_timeout_secs", cpu_s, 1)
    check_integer("ElasticBuffer", "num_gpu_timeout_secs", gpu_s, 1)
    return None if (cpu_s, gpu_s) == (_CPU_TIMEOUT_S, _GPU_TIMEOUT_S) else float(min(cpu_s, gpu_s))
