"""`Buffer`: DeepEP's V1 API. Every method takes the arguments of DeepEP and its forks, and returns DeepEP's tuples.

These arguments concern hardware or come from forks of DeepEP; all others do what DeepEP documents:

================================================== ==============================================================
argument                                           effect in tokenferry
================================================== ==============================================================
num_nvl_bytes, num_rdma_bytes                      kept as attributes; `Buffer.get_local_buffer_tensor` uses them.
                                                   CUDA: the larger is the memory for rows that peers write or read,
                                                   if it is more than 2 GiB; TOKENFERRY_HEAP_MB overrides both. With
                                                   TOKENFERRY_NETWORK=nvshmem other nodes put low-latency calls into
                                                   num_rdma_bytes more. CPU: calls allocate memory for rows as they
                                                   need it
num_qps_per_rank,                                  without effect, but with TOKENFERRY_NETWORK=nvshmem compared with
allow_nvlink_for_low_latency_mode                  NVSHMEM's variables: `UnsupportedError` if they contradict
allow_mnnvl, use_fabric                            checked, without effect: NVLink is used inside a host
config, Buffer.set_num_sms                         CUDA: SMs that a call may occupy, by ``config.num_sms``, else by
                                                   `Buffer.set_num_sms`, else by the library's own choice. The rest
                                                   of a `Config`, and all of it on the CPU, has no effect
num_sms                                            of `Buffer.low_latency_combine`: a hint without effect
previous_event, async_finish,                      CUDA: as in DeepEP; results of an asynchronous call are allocated
allocate_on_comm_stream                            on the communication stream in any case. CPU: checked by DeepEP's
                                                   rules; work is done when a call returns, so an event that is
                                                   returned has passed already
round_scale, use_ue8m0                             the format of FP8 scales; no effect without use_fp8
dispatch_wait_recv_cost_stats,                     nanoseconds are added (DeepEP: clock cycles)
combine_wait_recv_cost_stats
use_logfmt                                         needs bfloat16 rows, H a multiple of 128
comm, use_nvfp4, x_global_scale,                   `UnsupportedError` unless neutral (None, False, 0)
overlap, src_signals, src_signal_expect_value,
packed_recv_count, comp_signal, block_m, threshold
================================================== ==============================================================

For tensors on a GPU, the host reads no values but the counts that `Buffer.dispatch` returns. Counts that contradict
the routing are therefore not detected, and an index outside [-1, E) is detected by `Buffer.dispatch`.

Lifted limits: any R with E % R == 0 (also 1), any K, any H whose row is a multiple of 16 bytes, bfloat16, float16 and
float32 rows, T = 0 and T that differs by rank, and any number of results alive at once.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.ambient import methods_not_compiled, without_grad
from tokenferry.api import Connected
from tokenferry.checks import check_flags
from tokenferry.compat.deep_ep import config as configs
from tokenferry.compat.deep_ep import throughput
from tokenferry.compat.deep_ep.arguments import MOST_BYTES, Rows, check_config, check_integer, check_sizes, refuse
from tokenferry.compat.deep_ep.config import Config
from tokenferry.compat.deep_ep.connect import DEFAULT_QUEUE_PAIRS, LEAST_HEAP_BYTES, NvshmemNeeds, closing, connect
from tokenferry.compat.deep_ep.low_latency_calls import LowLatencyCalls
from tokenferry.compat.deep_ep.runtime import Runtime
from tokenferry.compat.deep_ep.streams import Lane, when_of
from tokenferry.compat.deep_ep.utils.event import EventHandle, EventOverlap
from tokenferry.compat.deep_ep.views import Views
from tokenferry.errors import ArgumentError, CapacityError
from tokenferry.types import Routing

_ROUTING_ARGUMENTS = (
    "num_tokens_per_rank", "num_tokens_per_rdma_rank", "is_token_in_rank", "num_tokens_per_expert", "topk_idx",
    "topk_weights", "num_worst_tokens",
)  # fmt: skip
"""Those of `Buffer.dispatch` that have to be None, or 0, if a handle has the routing."""


class DispatchLayout(NamedTuple):
    """The result of `Buffer.get_dispatch_layout`: a tuple of five, as DeepEP returns it, whose elements have names.

    Attributes:
        num_tokens_per_rank: ``[R]`` int32; a token counts once per rank.
        num_tokens_per_rdma_rank: ``[nodes]`` int32; a token counts once per node. None if there is one node.
        num_tokens_per_expert: ``[E]`` int32; a token counts once per expert.
        is_token_in_rank: ``[T, R]`` bool.
        event: The event that ``async_finish`` asked for; see `EventOverlap`.
    """

    num_tokens_per_rank: Tensor
    num_tokens_per_rdma_rank: Tensor | None
    num_tokens_per_expert: Tensor
    is_token_in_rank: Tensor
    event: EventOverlap


class _Layout:
    """A call of `Buffer.get_dispatch_layout`: its routing and the tensors that it returned, none of which it keeps.

    Attributes:
        num_experts: E.
    """

    __slots__ = ("_tensors", "_versions", "num_experts")

    def __init__(self, num_experts: int, *tensors: Tensor) -> None:
        self.num_experts = num_experts
        self._tensors = tuple(map(weakref.ref, tensors))
        # How often each was written. An inference tensor has no count.
        self._versions = [-1 if tensor.is_inference() else tensor._version for tensor in tensors]

    def is_of(self, *tensors: Tensor | None) -> bool:
        """Return whether these are the same tensors, in the same order, and known to hold the same as then."""
        for known, version, tensor in zip(self._tensors, self._versions, tensors, strict=False):
            if tensor is None or known() is not tensor or version < 0 or tensor._version != version:
                return False
        return len(tensors) == len(self._tensors)


@methods_not_compiled
class Buffer(Connected, LowLatencyCalls):
    """R ranks that send tokens to experts, with the interface of DeepEP's V1 `Buffer`.

    Contract:
        Collective: the constructor, `dispatch`, `combine`, `low_latency_dispatch` and `low_latency_combine`; the rest
            is local, including `destroy`.
        Host: CPU: every call returns with its work done, or with a hook that does the rest. CUDA: every call returns
            when its work is on its stream; `dispatch` waits for the counts that it returns, without holding the GIL.
        Stream: CUDA: torch's current stream; with ``async_finish=True`` the communication stream, see
            `get_comm_stream`.
        Gradient: none; results carry no graph. The backward of `dispatch` is `combine` with ``topk_weights``; that of
            `combine` is `dispatch` with the handle.

    Args:
        group: Any process group (on the CPU backend: one that supports CPU tensors), or None for a group of one rank.
            TOKENFERRY_BACKEND chooses the backend; by default the best that runs on every rank.
        num_nvl_bytes: Size of one of the two local buffers; see the table of this module.
        num_rdma_bytes: Size of the other local buffer.
        low_latency_mode: Allow the low-latency calls.
        num_qps_per_rank: With TOKENFERRY_NETWORK=nvshmem, if it is not the default: what NVSHMEM_IBGDA_NUM_RC_PER_PE
            has to be; if that is not set, a warning says so. Otherwise there are no queue pairs, and it has no effect.
        allow_nvlink_for_low_latency_mode: With TOKENFERRY_NETWORK=nvshmem False needs NVSHMEM_DISABLE_P2P=1. Otherwise
            it has no effect: nothing but NVLink reaches other ranks of a node, and NVLink reaches no other node.
        allow_mnnvl: A hint without effect.
        explicitly_destroy: Allow `destroy`. If False, everything is freed together with the object.
        enable_shrink: Mask a rank that does not answer in time in low-latency calls, instead of raising an error.
        comm: Not supported; must be None.
        use_fabric: A hint without effect.

    Raises:
        UnsupportedError: ``comm`` was given, or ``enable_shrink`` for a group that cannot skip ranks, or a variable of
            the environment asks for what cannot be honoured across nodes, or contradicts what is asked of NVSHMEM.
        ConfigError: a variable of the environment cannot be parsed.
        ArgumentError: ``enable_shrink`` without ``low_latency_mode``, a negative size, or a flag that is not a bool.
        BackendUnavailable: no backend runs on this group; gives the reason.
        PeerTimeout: a rank did not answer.
    """

    num_sms: int = 20
    _asked_num_sms: int | None = None

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = DEFAULT_QUEUE_PAIRS,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: object | None = None,
        *,
        use_fabric: bool = False,
    ) -> None:
        refuse("Buffer", "make it with a torch.distributed process group", comm=comm)
        check_integer("Buffer", "num_nvl_bytes", num_nvl_bytes, 0, MOST_BYTES)
        check_integer("Buffer", "num_rdma_bytes", num_rdma_bytes, 0, MOST_BYTES)
        check_integer("Buffer", "num_qps_per_rank", num_qps_per_rank, 0)
        check_flags(
            "Buffer",
            low_latency_mode=low_latency_mode,
            allow_nvlink_for_low_latency_mode=allow_nvlink_for_low_latency_mode,
            allow_mnnvl=allow_mnnvl,
            explicitly_destroy=explicitly_destroy,
            enable_shrink=enable_shrink,
            use_fabric=use_fabric,
        )
        if enable_shrink and not low_latency_mode:
            raise ArgumentError(
                "Buffer: enable_shrink: only low-latency calls can skip a rank; pass low_latency_mode=True"
            )
        self.group = group
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        heap_bytes = max(num_nvl_bytes, num_rdma_bytes, LEAST_HEAP_BYTES)
        puts = NvshmemNeeds(num_rdma_bytes, num_qps_per_rank, allow_nvlink_for_low_latency_mode)
        self._experts = connect("Buffer", group, heap_bytes=heap_bytes, enable_shrink=enable_shrink, puts=puts)
        self.rank, self.group_size = self._experts.rank, self._experts.num_ranks
        self._lane = Lane(self._experts.device)
        self._views = Views(self._experts)
        self._latest_layout: _Layout | None = None
        self._local: dict[bool, weakref.ref[torch.UntypedStorage]] = {}
        self._closing = closing(self, self._experts)
        self.runtime: Runtime | None = Runtime(self._experts)

    def destroy(self) -> None:
        """Free connections and memory; later calls raise ClosedError. Local and idempotent.

        Blocks as `tokenferry.ExpertGroup.close` does: on GPUs until the device has done what was queued; on CPUs over
        the transport "process_group", between nodes too, for at most 5 s, if peers have yet to make a call that this
        rank has made with a hook.

        Raises:
            ArgumentError: the buffer was made with ``explicitly_destroy=False``.
        """
        if not self.explicitly_destroy:
            raise ArgumentError("Buffer.destroy: explicitly_destroy=False frees by itself; make the Buffer with True")
        self._closing()
        self._local.clear()
        self.runtime = None

    # ------------------------------------------------------------------ small methods

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Return True: features that DeepEP compiles for SM90 only, such as FP8 rows, are available."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set ``Buffer.num_sms``, for calls without a config and for default configs; class-wide, as in DeepEP.

        Raises:
            ConfigError: ``new_num_sms`` is negative or odd.
        """
        configs.check_num_sms("Buffer.set_num_sms", new_num_sms, "new_num_sms")
        Buffer.num_sms = Buffer._asked_num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """Return an event of the work submitted so far to torch's current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """Return DeepEP's defaults for `dispatch`; for an R that it does not list, those of the next larger one.

        Raises:
            ArgumentError: ``num_ranks`` is not a positive integer.
        """
        check_sizes("Buffer.get_dispatch_config", num_ranks=num_ranks)
        return configs.dispatch_config(num_ranks, Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """Return DeepEP's defaults for `combine`; for an R that it does not list, those of the next larger one.

        Raises:
            ArgumentError: ``num_ranks`` is not a positive integer.
        """
        check_sizes("Buffer.get_combine_config", num_ranks=num_ranks)
        return configs.combine_config(num_ranks, Buffer.num_sms)

    def get_comm_stream(self) -> torch.cuda.Stream | torch.cpu.Stream:
        """Return the stream of calls with ``async_finish=True``: this Buffer's own; on the CPU the current one."""
        return torch.cpu.current_stream() if self._lane.stream is None else self._lane.stream

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: torch.Size | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        """Return a view of a local buffer of the size given to the constructor, which no call of the library uses.

        All views that are alive at the same time share their memory; it is freed with the last of them, and its content
        is undefined at first. CUDA: it is taken from the memory for rows if as much again stays free there, otherwise
        torch allocates it. (DeepEP returns the memory through which its rows travel. Here results and rows under way
        live in such memory, and writing to it would damage them.)

        Args:
            dtype: dtype of the returned view.
            size: Shape of the view; None: one dimension with all the memory after ``offset``.
            offset: Bytes to skip at the start.
            use_rdma_buffer: Use the buffer of ``num_rdma_bytes`` instead of that of ``num_nvl_bytes``.

        Raises:
            ArgumentError: ``size`` and ``offset`` exceed the memory, or ``offset`` does not fit ``dtype``.
            CapacityError: CUDA: there is not enough memory on the GPU.
            ResourceError: CPU: the system refused the memory. The group stays usable.
        """
        call = "Buffer.get_local_buffer_tensor"
        self._open(call)
        check_integer(call, "offset", offset, 0, MOST_BYTES)
        check_flags(call, use_rdma_buffer=use_rdma_buffer)
        if not isinstance(dtype, torch.dtype):
            raise ArgumentError(f"{call}: dtype: expected a torch.dtype, got {dtype!r}")
        if size is not None:
            if not isinstance(size, Sequence):
                raise ArgumentError(f"{call}: size: expected a torch.Size or None, got {size!r}")
            for place, length in enumerate(size):
                check_integer(call, f"size[{place}]", length, 0, MOST_BYTES)
        name, have = ("num_nvl_bytes", self.num_nvl_bytes)
        if use_rdma_buffer:
            name, have = ("num_rdma_bytes", self.num_rdma_bytes)
        shape = [(have - offset) // dtype.itemsize] if size is None else list(size)
        end = offset + math.prod(shape) * dtype.itemsize
        if not 0 <= offset <= end <= have or offset % dtype.itemsize:
            raise ArgumentError(
                f"{call}: {dtype} {shape} at {offset=} would end at byte {end} of "
                f"{name}={have}; ask for less, at a multiple of {dtype.itemsize} bytes, or make a larger Buffer"
            )
        known = self._local.get(use_rdma_buffer)
        storage = None if known is None else known()
        if storage is None:
            try:
                storage = self._experts._backend.scratch(have).untyped_storage()
            except torch.OutOfMemoryError as error:
                raise CapacityError(
                    f"{call}: {name}={have} bytes are not available on {self._experts.device}; "
                    "free memory, or make a smaller Buffer"
                ) from error
            except (RuntimeError, MemoryError, OSError) as error:
                self._experts._raise_if_refused(f"{call}: {name}={have} bytes are not available", error, local=True)
                raise
            self._local[use_rdma_buffer] = weakref.ref(storage)
        whole = torch.empty(0, dtype=torch.uint8, device=self._experts.device).set_(storage)
        return whole[offset:end].view(dtype).view(shape)

    # ------------------------------------------------------------------ normal mode

    @without_grad
    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> DispatchLayout:
        """Count the tokens for each rank and expert. Local; on CUDA one kernel.

        Args:
            topk_idx: ``[T, K]`` int64 or int32 in ``[-1, E)``; -1: slot unused.
            num_experts: E, a multiple of R.
            previous_event: Event to wait for, or None.
            async_finish: Return an event that can be waited for.
            allocate_on_comm_stream: Accepted only together with ``previous_event`` and ``async_finish``.

        Returns:
            DispatchLayout: counts for each rank, node and expert, ``is_token_in_rank`` and an event; a tuple of five.

        Raises:
            ShapeError, RoutingError, ConfigError, ArgumentError: an argument is wrong; names it.
        """
        call = "Buffer.get_dispatch_layout"
        self._open(call)
        when = when_of(previous_event, async_finish, allocate_on_comm_stream)
        found, event = self._lane.run(
            call, when, (topk_idx,), lambda: throughput.layout_of(self._views, topk_idx, num_experts, call)
        )
        assert found.per_expert is not None
        per_node = found.per_node if len(self._views.nodes) > 1 else None
        of_nodes = () if per_node is None else (per_node,)
        self._latest_layout = _Layout(num_experts, topk_idx, found.in_rank, found.per_rank, found.per_expert, *of_nodes)
        return DispatchLayout(found.per_rank, per_node, found.per_expert, found.in_rank, event)

    @without_grad
    def dispatch(
        self,
        x: Rows,
        handle: throughput.Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, list[int] | None, throughput.Handle | None, EventOverlap]:
        """Send every token to each rank that holds one of its experts. Collective.

        Args:
            x: ``[T, H]``, or rows with scales, ``([T, H], [T, S])``; scales of any dtype and strides.
            handle: Handle of an earlier call, to send the rows to the same places; the routing arguments must be None.
            num_tokens_per_rank: As returned by `get_dispatch_layout`.
            num_tokens_per_rdma_rank: As returned by `get_dispatch_layout`, or None.
            is_token_in_rank: As returned by `get_dispatch_layout`. Entries may be cleared, to drop the slots of a rank,
                but ranks that ``topk_idx`` does not name cannot be added.
            num_tokens_per_expert: As returned by `get_dispatch_layout`; its length determines E.
            topk_idx: ``[T, K]`` int64 or int32; None: rows are sent alone, by ``is_token_in_rank``.
            topk_weights: ``[T, K]`` float32 to send with the rows; needs ``topk_idx``.
            expert_alignment: Multiple to which the counts in the returned list are rounded up. With a handle, which
                returns no list, it is checked, and has no effect.
            num_worst_tokens: If above 0, the number of rows of the results; rows past the received ones have
                ``recv_topk_idx`` -1 and undefined data, and the list of counts is empty. CPU: rows that do not fit
                raise CapacityError on every rank. CUDA: must be at least R times the most tokens of any rank, or
                CapacityError is raised; the host does not wait.
            config: Only ``num_sms`` has an effect, on CUDA.
            previous_event: Event to wait for, or None.
            async_finish: Return an event that can be waited for.
            allocate_on_comm_stream: Accepted only together with ``previous_event`` and ``async_finish``.

        Returns:
            (``recv_x`` ``[N, H]`` in the form of ``x``, by source rank, then token; ``recv_topk_idx`` ``[N, K]`` local
            experts, -1 for those of other ranks; ``recv_topk_weights`` ``[N, K]``, 0 there; rows per local expert as a
            list of ints; handle; event). With a handle: (``recv_x``, None, None, None, None, event). ``handle[0]`` is
            the int32 ``[R, R]`` matrix in which ``[i, rank]`` counts the rows from ranks 0..i; columns of other ranks
            are -1. With several nodes ``handle[-4]`` is this rank's column of it, and ``handle[0]``
            ``is_token_in_rank``. The handle shares ``recv_topk_idx``: while it is in use, change a copy, not the tensor
            in place.

        Raises:
            ArgumentError: arguments are missing or contradict each other; names them.
            ShapeError, RoutingError, CapacityError, PlanError, MismatchError, PeerTimeout, ClosedError: as
                `ExpertGroup.dispatch`.
        """
        call = "Buffer.dispatch"
        self._open(call)
        num_sms = self._num_sms(call, config)
        when = when_of(previous_event, async_finish, allocate_on_comm_stream)
        if handle is not None:
            given = (
                num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert, topk_idx,
                topk_weights, None if type(num_worst_tokens) is int and num_worst_tokens == 0 else num_worst_tokens,
            )  # fmt: skip
            for name, value in zip(_ROUTING_ARGUMENTS, given, strict=True):
                if value is not None:
                    raise ArgumentError(
                        f"{call}: {name}: expected None, since handle has the routing; leave out one of them"
                    )
            if type(expert_alignment) is not int or expert_alignment != 1:
                check_integer(call, "expert_alignment", expert_alignment, 1)
            again, event = self._lane.run(
                call, when, (x, handle), lambda: throughput.dispatch_again(self._views, x, handle, num_sms)
            )
            return again, None, None, None, None, event
        if topk_weights is not None and topk_idx is None:
            raise ArgumentError(f"{call}: topk_weights: needs topk_idx, got None; pass both or neither")
        if num_tokens_per_rank is None or is_token_in_rank is None or num_tokens_per_expert is None:
            needed = {
                "num_tokens_per_rank": num_tokens_per_rank,
                "is_token_in_rank": is_token_in_rank,
                "num_tokens_per_expert": num_tokens_per_expert,
            }
            name = next(name for name, value in needed.items() if value is None)
            raise ArgumentError(f"{call}: {name}: expected a tensor, got None; pass what get_dispatch_layout returned")
        layout = throughput.TokenLayout(
            num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank
        )
        routing = None if topk_idx is None else Routing(topk_idx, topk_weights)
        options = throughput.Options(expert_alignment, num_worst_tokens, num_sms, self._known_experts(topk_idx, layout))
        inputs, views = (x, topk_idx, topk_weights, layout), self._views
        sent, event = self._lane.run(
            call, when, inputs, lambda: throughput.dispatch(views, x, routing, layout, options)
        )
        return *sent, event

    @without_grad
    def combine(
        self,
        x: Tensor,
        handle: throughput.Handle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Add up the rows of each token: biases first, then rank by rank, in float32, rounded once. Collective.

        With several nodes the rows of each node are added up first, and their sum is rounded before it crosses.

        Args:
            x: ``[N, H]``: one row for each row that `dispatch` delivered; gate weights are not applied.
            handle: Handle of a `dispatch`; may be used again.
            topk_weights: ``[N, K]`` float32 to add up in the same way.
            bias: A tensor ``[T, H]``, a tuple of two, or None.
            config: Only ``num_sms`` has an effect, on CUDA.
            previous_event: Event to wait for, or None.
            async_finish: Return an event that can be waited for.
            allocate_on_comm_stream: Accepted only together with ``previous_event`` and ``async_finish``.

        Returns:
            (``combined_x`` ``[T, H]``, ``combined_topk_weights`` ``[T, K]`` or None, event).

        Raises:
            ArgumentError, ShapeError, PlanError, MismatchError, PeerTimeout, ClosedError: as `ExpertGroup.combine`.
        """
        call = "Buffer.combine"
        self._open(call)
        num_sms = self._num_sms(call, config)
        when = when_of(previous_event, async_finish, allocate_on_comm_stream)
        (combined_x, weights), event = self._lane.run(
            call,
            when,
            (x, handle, topk_weights, bias),
            lambda: throughput.combine(self._views, x, handle, topk_weights, bias, num_sms),
        )
        return combined_x, weights, event

    def internode_dispatch(
        self,
        x: Rows,
        handle: throughput.Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, list[int] | None, throughput.Handle | None, EventOverlap]:
        """Call `dispatch`, which crosses nodes by itself. Collective.

        Raises:
            ArgumentError: the group has one node.
        """
        self._check_internode("Buffer.internode_dispatch")
        return self.dispatch(
            x,
            handle,
            num_tokens_per_rank,
            num_tokens_per_rdma_rank,
            is_token_in_rank,
            num_tokens_per_expert,
            topk_idx,
            topk_weights,
            expert_alignment,
            config=config,
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
        )

    def internode_combine(
        self,
        x: Tensor,
        handle: throughput.Handle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Call `combine`, which crosses nodes by itself. Collective.

        Raises:
            ArgumentError: the group has one node.
        """
        self._check_internode("Buffer.internode_combine")
        return self.combine(
            x, handle, topk_weights, bias, config, previous_event, async_finish, allocate_on_comm_stream
        )

    def _check_internode(self, call: str) -> None:
        self._open(call)
        if len(self._views.nodes) == 1:
            raise ArgumentError(f"{call}: the group has one node; call Buffer.{call.rpartition('_')[2]} instead")

    def _num_sms(self, call: str, config: Config | None) -> int | None:
        """Return the number of SMs that a call may occupy; None: the library's choice.

        Raises:
            ArgumentError: ``config`` is neither a Config nor None.
        """
        if config is not None:
            check_config(call, config)
        if self._lane.stream is None:
            return None
        return (Buffer._asked_num_sms if config is None else config.num_sms) or None

    def _known_experts(self, topk_idx: Tensor | None, given: throughput.TokenLayout) -> int:
        """Return E if the latest `get_dispatch_layout` made this of ``topk_idx``, and nothing has changed; else 0."""
        latest, of_nodes = self._latest_layout, () if given.per_node is None else (given.per_node,)
        if latest is None or not latest.is_of(topk_idx, given.in_rank, given.per_rank, given.per_expert, *of_nodes):
            return 0
        return latest.num_experts
