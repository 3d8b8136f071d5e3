"""`ExpertBuffer`: what `ElasticBuffer` of DeepEP 2 and `EPBuffer` of DeepEP 2.5 have in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.ambient import methods_not_compiled, not_compiled, without_grad
from tokenferry.api import Connected, ExpertGroup
from tokenferry.checks import check_flags
from tokenferry.compat.deep_ep import elastic_calls as calls
from tokenferry.compat.deep_ep.arguments import Rows, check_integer, check_speeds
from tokenferry.compat.deep_ep.config import round_up
from tokenferry.compat.deep_ep.connect import LEAST_HEAP_BYTES, closing, connect
from tokenferry.compat.deep_ep.dialects import ELASTIC, barrier
from tokenferry.compat.deep_ep.elastic_arguments import Arguments, Returned
from tokenferry.compat.deep_ep.elastic_calls import Received
from tokenferry.compat.deep_ep.elastic_handle import CPU_NUM_SMS
from tokenferry.compat.deep_ep.elastic_streams import ElasticWhen, run
from tokenferry.compat.deep_ep.streams import Lane, when_of
from tokenferry.compat.deep_ep.utils.event import EventHandle, EventOverlap
from tokenferry.compat.deep_ep.views import Views
from tokenferry.compat.deep_ep.wording import put_term
from tokenferry.errors import ArgumentError, ClosedError, ConfigError, TokenferryError
from tokenferry.options import check_group
from tokenferry.types import DispatchOptions, Routing

CPU_TIMEOUT_S, GPU_TIMEOUT_S = 300, 100
_BYTES_UNIT = 2 << 20
_NO_SERVICE_LEVEL = (None, 0, 3)
"""Values of ``sl_idx`` that choose nothing: the default of DeepEP 2.5, that of InfiniBand, which vLLM passes, and the
default of DeepEP 2."""
_UNKNOWN_TOP_K = 32
"""K of the sizes if it is not known, as in DeepEP."""
_FLAGS = (
    "use_fp8_dispatch", "deterministic", "allow_hybrid_mode", "allow_multiple_reduction", "prefer_overlap_with_compute",
    "explicitly_destroy",
)  # fmt: skip
_TYPICAL_HIDDEN, _MANY_TOKENS = 7168, 4096
"""Sizes for which SMs are advised if the constructor got none."""


def num_ranks_of(call: str, group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks of a process group; raise ConfigError unless this process can use it."""
    try:
        return check_group(group)
    except ConfigError as error:
        put_term(error, call, {})
        raise


@not_compiled
def get_physical_domain_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return the number of nodes and of ranks in each. Collective: it makes a group of tokenferry, and closes it."""
    num_ranks_of("get_physical_domain_size", group)
    made = ExpertGroup._with_heap(group, heap_bytes=_BYTES_UNIT)
    try:
        return made.topology.num_nodes, made.topology.ranks_per_node
    finally:
        made.close()


def get_logical_domain_size(group: dist.ProcessGroup | None, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """Return 1 and R: ranks of all nodes are addressed alike, whatever ``allow_hybrid_mode`` says. Local."""
    check_flags("get_logical_domain_size", allow_hybrid_mode=allow_hybrid_mode)
    return 1, num_ranks_of("get_logical_domain_size", group)


@dataclass(slots=True, eq=False)
class Settings:
    """The arguments of a constructor that have an effect, are checked or are kept; they have the names of DeepEP."""

    num_bytes: int | None
    num_max_tokens_per_rank: int
    hidden: int
    num_topk: int
    use_fp8_dispatch: bool
    deterministic: bool
    allow_hybrid_mode: bool
    allow_multiple_reduction: bool
    prefer_overlap_with_compute: bool
    sl_idx: int | None
    num_allocated_qps: int
    num_cpu_timeout_secs: int
    num_gpu_timeout_secs: int
    explicitly_destroy: bool


@methods_not_compiled
class ExpertBuffer(Connected):
    """The group, the streams and the calls of a buffer for Mixture-of-Experts; a subclass has DeepEP's signatures.

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
    """

    _NAME: ClassVar[str]
    """The name of the class in DeepEP, for errors."""

    nccl_comm_handle = None

    def __init__(self, group: dist.ProcessGroup | None, given: Settings) -> None:
        call, num_bytes = self._NAME, given.num_bytes
        for name in ("num_max_tokens_per_rank", "hidden", "num_topk", "num_allocated_qps"):
            check_integer(call, name, getattr(given, name), 0)
        check_flags(call, **{name: getattr(given, name) for name in _FLAGS})
        if given.sl_idx is not None:
            check_integer(call, "sl_idx", given.sl_idx, 0)
        if num_bytes is None and not given.num_max_tokens_per_rank:
            raise ArgumentError(f"{call}: expected num_bytes or num_max_tokens_per_rank, got neither; pass one of them")
        if num_bytes is not None and (type(num_bytes) is not int or num_bytes < 1 or num_bytes % _BYTES_UNIT):
            raise ArgumentError(
                f"{call}: num_bytes: expected a multiple of {_BYTES_UNIT} (2 MiB), got {num_bytes!r}; see "
                "get_buffer_size_hint"
            )
        if num_bytes is None and given.hidden:
            num_bytes = self.get_buffer_size_hint(group, given.num_max_tokens_per_rank, given.hidden, given.num_topk)
        self.num_bytes = num_bytes or LEAST_HEAP_BYTES
        self._experts = connect(
            call,
            group,
            heap_bytes=max(self.num_bytes, LEAST_HEAP_BYTES),
            timeout_s=_timeout_s(call, given),
            service_level=None if given.sl_idx in _NO_SERVICE_LEVEL else given.sl_idx,
        )
        self.group = group
        self.num_max_tokens_per_rank, self._hidden = given.num_max_tokens_per_rank, given.hidden
        self.allow_hybrid_mode, self.allow_multiple_reduction = given.allow_hybrid_mode, given.allow_multiple_reduction
        self.prefer_overlap_with_compute, self.deterministic = given.prefer_overlap_with_compute, given.deterministic
        self.num_allocated_qps, self.explicitly_destroy = given.num_allocated_qps, given.explicitly_destroy
        self.rank_idx = self.scaleup_rank_idx = self._experts.rank
        self.num_ranks = self.num_scaleup_ranks = self._experts.num_ranks
        self.num_scaleout_ranks, self.scaleout_rank_idx = 1, 0
        self.num_rdma_ranks, self.num_nvlink_ranks = self.get_physical_domain_size()
        self._lane = Lane(self._experts.device)
        self._views = Views(self._experts)
        self._closing = closing(self, self._experts)
        self.runtime: ExpertGroup | None = self._experts

    def destroy(self) -> None:
        """Free connections and memory; later calls raise ClosedError. Local and idempotent.

        Blocks as `tokenferry.ExpertGroup.close` does: on GPUs until the device has done what was queued; on CPUs over
        the transport "process_group", between nodes too, for at most 5 s, if peers have yet to make a call that this
        rank has made with a hook.

        Raises:
            ArgumentError: the buffer was made with ``explicitly_destroy=False``.
        """
        if not self.explicitly_destroy:
            raise ArgumentError(
                f"{self._NAME}.destroy: explicitly_destroy=False frees by itself; make the {self._NAME} with True"
            )
        self._closing()
        self.runtime = None

    @classmethod
    def get_buffer_size_hint(
        cls,
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
            ConfigError: ``group`` is no process group of this process.
        """
        call = f"{cls._NAME}.get_buffer_size_hint"
        check_integer(call, "num_max_tokens_per_rank", num_max_tokens_per_rank, 1)
        check_integer(call, "hidden", hidden, 1)
        check_integer(call, "num_topk", num_topk, 0)
        check_flags(
            call,
            use_fp8_dispatch=use_fp8_dispatch,
            allow_hybrid_mode=allow_hybrid_mode,
            allow_multiple_reduction=allow_multiple_reduction,
        )
        row_bytes = 2 * hidden + 24 * (num_topk or _UNKNOWN_TOP_K) + 8  # data; weights, ids and places; source token
        num_rows = num_max_tokens_per_rank * num_ranks_of(call, group)
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

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Return 1: there are no queue pairs, and every number is as good."""
        check_integer(f"{self._NAME}.get_theoretical_num_qps", "num_sms", num_sms, 0)
        return 1

    @without_grad
    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        """Wait for all ranks: on the CPU the host, on CUDA the current stream. Collective.

        Args:
            use_comm_stream: Wait on the communication stream, too.
            with_cpu_sync: CUDA: the host waits as well.
            sequential: A hint without effect.

        Raises:
            ArgumentError: a flag is not a bool.
            MismatchError, PeerTimeout, ClosedError: as `ExpertGroup.dispatch`.
        """
        call = f"{self._NAME}.barrier"
        self._open(call)
        check_flags(call, use_comm_stream=use_comm_stream, with_cpu_sync=with_cpu_sync, sequential=sequential)
        # Nobody is done with a dispatch before all have begun it, even if there is nothing to send.
        nothing = torch.empty(0, 16, dtype=torch.uint8, device=self._experts.device)
        routing = Routing(torch.empty(0, 1, dtype=torch.int64, device=nothing.device))
        rows = calls.checked_rows(call, nothing, nothing.device).rows
        options = DispatchOptions(counts="device")

        def meet() -> None:
            self._views.of(self.num_ranks, 1, 16, 1).dispatch(rows, routing, options=options)

        try:
            _, event = self._lane.run(call, when_of(None, use_comm_stream, False), (nothing, routing), meet)
            if event.event is not None:
                event.current_stream_wait()
            if with_cpu_sync:
                self._experts.synchronize()
        except TokenferryError as error:
            ELASTIC[self._NAME].put(error, call, self._views, barrier(self._NAME))
            raise

    # ------------------------------------------------------------------ for subclasses

    def _advised_num_sms(self, num_experts: int, num_topk: int, num_scaleout_topk: int, **speeds: float) -> int:
        """Return how many SMs both directions can use: even, at least 4, and no more than there are; on the CPU 20."""
        call = f"{self._NAME}.get_theoretical_num_sms"
        check_integer(call, "num_experts", num_experts, 1)
        check_integer(call, "num_topk", num_topk, 1)
        check_integer(call, "num_scaleout_topk", num_scaleout_topk, 0)
        check_speeds(call, **speeds)
        if self._experts.backend != "cuda":
            return CPU_NUM_SMS
        most_tokens = self.num_max_tokens_per_rank or _MANY_TOKENS
        try:
            sms = self._views.of(num_experts, num_topk, self._hidden or _TYPICAL_HIDDEN, most_tokens)._call_sms()
        except TokenferryError as error:
            ELASTIC[self._NAME].put(error, call, self._views)
            raise
        assert sms is not None
        return max(4, max(sms.dispatch, sms.combine) // 2 * 2)

    def _dispatch(self, x: Rows, handle: object, given: Arguments, when: ElasticWhen) -> tuple[Received, EventOverlap]:
        """Send rows by a new routing or along a handle; see `ElasticBuffer.dispatch`. Collective."""
        sent = calls.checked_rows(given.call, x, self._experts.device)
        if handle is not None:
            known = calls.checked_handle(given.call, handle)
            calls.check_again(known, given)
            inputs: tuple[Any, ...] = (x, given.topk_weights, known)
            work = partial(calls.dispatch_again, self._views, sent, known, given)
        else:
            request = calls.resolved(self._experts, sent.rows, given, self.num_max_tokens_per_rank)
            inputs = (x, given.topk_idx, given.topk_weights, given.cumulative_local_expert_recv_stats)
            work = partial(calls.dispatch, self._views, sent, request)
        done, event = run(self._lane, given.call, when, inputs, work)
        if handle is None:
            done.handle.note_event(event.event)
        return done, event

    def _combine(
        self, handle: object, returned: Returned, when: ElasticWhen
    ) -> tuple[tuple[Tensor, Tensor | None], EventOverlap]:
        """Add up the rows of each token; see `ElasticBuffer.combine`. Collective."""
        known = calls.checked_handle(returned.call, handle)
        calls.check_returned(self._experts.device, known, returned)
        inputs = (returned.x, returned.topk_weights, returned.bias, known)
        return run(self._lane, returned.call, when, inputs, partial(calls.combine, self._views, known, returned))

    def _open(self, call: str) -> None:
        """Raise ClosedError after `destroy`, after an error that broke the group, and in a forked child."""
        if self.runtime is None:
            raise ClosedError(f"{call}: the {self._NAME} was destroyed; make a new one")
        try:
            self._experts._ready(call)
        except ClosedError as error:
            ELASTIC[self._NAME].put(error, call, self._views)
            raise


def _timeout_s(call: str, given: Settings) -> float | None:
    """Return the timeout of a group; None: that of the environment, if both are the defaults.

    Raises:
        ArgumentError: a timeout is not positive.
    """
    cpu_s, gpu_s = given.num_cpu_timeout_secs, given.num_gpu_timeout_secs
    check_integer(call, "num_cpu_timeout_secs", cpu_s, 1)
    check_integer(call, "num_gpu_timeout_secs", gpu_s, 1)
    return None if (cpu_s, gpu_s) == (CPU_TIMEOUT_S, GPU_TIMEOUT_S) else float(min(cpu_s, gpu_s))
