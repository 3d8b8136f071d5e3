"""`ExpertGroup`, the entry point of the library. Each call checks its arguments and passes a request to a backend."""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import NoReturn, SupportsIndex, TypeVar, overload
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.ambient import methods_not_compiled, reports_interrupts, without_function_modes
from tokenferry.backends.base import Backend, CallSms, TokenLayout
from tokenferry.backends.choose import make_backend
from tokenferry.errors import ArgumentError, ClosedError, PickleError, TokenferryError
from tokenferry.options import check_divides, check_group, resolve_options
from tokenferry.resolve import Resolver
from tokenferry.topology import Topology
from tokenferry.types import (
    BackendName,
    Combined,
    DecodeCombined,
    DecodeDispatched,
    DecodePlan,
    DecodeStats,
    Dispatched,
    DispatchOptions,
    EncodingName,
    MoeShape,
    Numerics,
    Plan,
    Quantized,
    Routing,
    Scale,
    TimeoutPolicy,
    TransportName,
)

# The one piece of global state of the public API: torch.library ops take strings, not objects, so `tokenferry.autograd`
# finds a group by its key, even from a graph that was compiled long ago. Weak, so that it keeps no group alive.
_groups: WeakValueDictionary[str, ExpertGroup] = WeakValueDictionary()

_MAY_BE_REFUSALS = (OSError, MemoryError, RuntimeError)  # by which the system and torch say that they refuse a resource

_Group = TypeVar("_Group", bound="ExpertGroup")
_Connected = TypeVar("_Connected", bound="Connected")


class Connected:
    """Base of objects that own connections and memory of this process: a copy is the object itself; no pickles."""

    def __copy__(self: _Connected) -> _Connected:
        return self

    def __deepcopy__(self: _Connected, memo: dict[int, object]) -> _Connected:
        return self  # so that copies of a model, such as a moving average, share the group

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        name = type(self).__name__
        raise PickleError(
            f"{name}: cannot be pickled, since its connections and memory belong to this process; to save a model, "
            f"save model.state_dict() and load it into a model with a new {name}; another process makes its own"
        )


@methods_not_compiled
class ExpertGroup(Connected):
    """R ranks that share E experts, and the calls that move rows between them.

    Contract:
        Collective: the constructor, `warmup`, `dispatch`, `redispatch`, `combine`, `decode_dispatch` and
            `decode_combine`; all ranks call them in the same order. `close`, `for_shape`, `mask`, `empty_rows`,
            `synchronize` and the attributes are local.
        Threads: one thread at a time; on CPUs a call of a second one at the same time raises ArgumentError.
        Processes: in a forked child every call raises ClosedError; `close` does nothing there.
        Copies: `copy.copy` and `copy.deepcopy`, also of a model that holds the group, share it. Pickling it raises
            PickleError.
        Host: CPU backend: every call returns with its work done, or with a hook that does the rest; either way its
            input rows may be overwritten afterwards. CUDA: a call returns when its work is on the stream or, if the
            host needs counts, when the counts have arrived; it never waits for rows. Every wait for a peer has a
            deadline: ``timeout_s``, and up to four times that for work of this rank that itself waits for peers.
        Stream: CUDA: a call runs on torch's current stream. Consecutive calls may be made on different streams: each
            waits for the one before.
        Errors on the device: an error that the device detects (bad indices with ``counts="device"``, a late or dead
            peer) is raised by the next call, or by `synchronize`. The plan and the results of such a call are
            undefined.

    Args:
        group: A process group, or None for a group of one rank, which needs no initialisation (and warns if this
            process is one of several). Backend cpu: one that supports CPU tensors (gloo, or ``cpu:gloo,cuda:nccl``);
            cuda: any (gloo, nccl). A process that is not a member of the process group cannot make a group.
        shape: The sizes of the group, the same on all ranks.
        backend: ``"cuda"``, ``"cpu"``, or ``"auto"`` for the best one that runs on every rank; a log line names the
            choice and the reason.
        transport: How CPU ranks reach each other: ``"shared_memory"`` (shared memory, all ranks on one host),
            ``"process_group"`` (send and receive of torch.distributed) or ``"auto"`` for the best one that works
            for all ranks. These exclude backend cuda. ``"nvshmem"``: on GPUs of several nodes decode calls put what
            crosses into memory of other nodes with NVSHMEM, where otherwise NCCL exchanges it; excludes backend cpu.
        timeout_s: Seconds that any wait for a peer may take, above 0 and at most 1000000; None: TOKENFERRY_TIMEOUT_S,
            or 100 if it is not set.
        on_timeout: ``"raise"``: `PeerTimeout`, and the group is broken. ``"mask"``: decode calls mask the silent rank
            (see `mask`) and continue without it; the other calls raise. Backend cpu: a rank that itself waits for
            another one is given half as much time again; needs the transport ``"shared_memory"``; cuda: needs all
            ranks on one node, or the transport ``"nvshmem"``.
        ranks_per_node: Number of consecutive ranks that form a node (a smaller group is one); None:
            TOKENFERRY_RANKS_PER_NODE, or if that is not set, the ranks of a host form one. With several nodes, dispatch
            sends a row across the network once for each node, and combine adds up the rows of each node before they
            cross; see `Topology`.

    Attributes:
        shape: E, K, H and M.
        timeout_s: Seconds that any wait for a peer may take.
        process_group: The process group of which this group was made; None for this rank alone.

    Raises:
        ConfigError: an option is wrong, E is not a multiple of R, or ranks disagree; gives the value of each rank.
        BackendUnavailable: the backend or transport cannot run here; gives the reason. Backend cuda: also for more than
            8 ranks a node, E > 4096 or K > 64, for which ``"auto"`` chooses the CPU.
        PeerTimeout: a rank did not answer.

    Example:
        >>> import torch, tokenferry
        >>> shape = tokenferry.MoeShape(num_experts=4, top_k=2, hidden=8, max_tokens=16)
        >>> with tokenferry.ExpertGroup(None, shape, backend="cpu") as group:
        ...     x = torch.ones(3, 8)
        ...     sent = group.dispatch(x, tokenferry.Routing(torch.tensor([[0, 1], [2, -1], [3, 0]])))
        ...     group.combine(sent.x * 2, sent.plan).x[0, 0].item()
        2.0
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        shape: MoeShape,
        *,
        backend: BackendName = "auto",
        transport: TransportName = "auto",
        timeout_s: float | None = None,
        on_timeout: TimeoutPolicy = "raise",
        ranks_per_node: int | None = None,
    ) -> None:
        resolved = resolve_options(group, shape, backend, transport, timeout_s, on_timeout, ranks_per_node)
        self._adopt(make_backend(group, resolved), shape, resolved.timeout_s, process_group=group)

    @classmethod
    def _with_heap(
        cls,
        group: dist.ProcessGroup | None,
        *,
        heap_bytes: int,
        shape: MoeShape | None = None,
        timeout_s: float | None = None,
        cache_folder: str | None = None,
        on_timeout: TimeoutPolicy = "raise",
        put_bytes: int | None = None,
    ) -> ExpertGroup:
        """Make a group with ``heap_bytes`` of GPU memory for rows, unless TOKENFERRY_HEAP_MB is set. Collective.

        Kernels are kept in ``cache_folder``; None: where TOKENFERRY_CACHE_DIR says. Over NVSHMEM other nodes put decode
        calls into ``put_bytes`` of memory; None: as much as the shape needs.

        For APIs that receive the sizes only with each call, so that the memory cannot be derived from them: without
        ``shape`` the group has the smallest one.
        """
        shape = MoeShape(check_group(group), 1, 16, 1) if shape is None else shape
        resolved = resolve_options(group, shape, "auto", "auto", timeout_s, on_timeout)
        num_bytes = heap_bytes if resolved.heap_bytes is None else resolved.heap_bytes
        folder = resolved.cache_folder if cache_folder is None else cache_folder
        resolved = replace(resolved, heap_bytes=num_bytes, cache_folder=folder, put_bytes=put_bytes)
        made = object.__new__(cls)
        made._adopt(make_backend(group, resolved), shape, resolved.timeout_s, process_group=group)
        return made

    # ------------------------------------------------------------------ attributes and local calls

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self._backend.rank

    @property
    def num_ranks(self) -> int:
        """Number of ranks in the group, R."""
        return self._backend.num_ranks

    @property
    def key(self) -> str:
        """Identifier of the group in its plans: a string, the same on all ranks, and of all views by `for_shape`."""
        return self._backend.key

    @property
    def num_local_experts(self) -> int:
        """Experts on this rank, L = E / R: those numbered ``rank * L .. rank * L + L - 1``."""
        return self.shape.num_experts // self.num_ranks

    @property
    def backend(self) -> str:
        """The backend in use: ``"cuda"`` or ``"cpu"``."""
        return self._backend.name

    @property
    def transport(self) -> str:
        """The transport in use; "none" for a group of one rank.

        "nvlink", "shared_memory" or "process_group"; with several nodes "shared_memory+process_group", on GPUs
        "nvlink+nccl": the first within a node, the second between nodes. Nodes of one rank have the second alone. With
        ``transport="nvshmem"`` there is a third for decode calls: "nvlink+nccl+nvshmem".
        """
        return self._backend.transport

    @property
    def topology(self) -> Topology:
        """The nodes of the group, and the place of this rank among them."""
        return self._backend.topology

    @property
    def device(self) -> torch.device:
        """The device on which every tensor argument has to be."""
        return self._backend.device

    @property
    def masked_ranks(self) -> frozenset[int]:
        """Ranks that decode calls skip, as this rank knows them; see `mask`. A copy.

        Contract: local, never waits. CUDA: it lags behind the calls that are queued: a rank that one of them masks by
            its timeout appears when the device has come to that; `synchronize` waits for it.
        """
        return self._backend.masked()

    def for_shape(self: _Group, shape: MoeShape) -> _Group:
        """Return a view of this group for other sizes; both share ranks, connections and errors.

        Contract: local, returns at once. All ranks must make the same view before any of them uses it. Closing or
        breaking either one closes or breaks both.

        Raises:
            ConfigError: E is not a multiple of R.
            ClosedError: the group was closed or is broken.
        """
        self._ready("for_shape")
        check_divides("for_shape", shape, self.num_ranks)
        other = object.__new__(type(self))
        origin = self._origin or self
        other._adopt(self._backend, shape, self.timeout_s, process_group=self.process_group, origin=origin)
        return other

    def mask(self, rank: int, *, masked: bool = True) -> None:
        """Make decode calls skip a rank in both directions, or stop skipping it.

        Rows for a masked rank are not sent, and its experts add nothing to combined rows. With ``on_timeout="mask"``
        decode calls mask a rank that stays silent. In the call that times out, the rows of that rank are undefined.

        Contract of masking: local, returns at once. Call it between a `decode_combine` and the next `decode_dispatch`,
        on both sides: a rank that does not mask those that mask it waits for them until its timeout. Ranks may mask
        differently; across nodes, if one masks any, all do, and on CUDA all mask the same. A masked rank passes nothing
        on there: see docs/across-nodes.md. CUDA: pending hooks are called first.

        Contract of unmasking: if two ranks have masked each other by hand, between the same two calls on both, and make
        the same number of calls meanwhile, both may unmask each other before any later call: local, returns at once.
        CPU: for hooks that are pending, the other rank has sent nothing, as if it were masked still. A rank that was
        lost (stopped, late, masked by a timeout), or has made more or fewer calls, comes back when all ranks do

            group.synchronize()  # after replays of CUDA graphs: torch.cuda.synchronize()
            dist.barrier()
            for rank in range(group.num_ranks):  # including this rank
                group.mask(rank, masked=False)
            dist.barrier()

        with barriers that are not calls of this group. If some ranks stay away, the others do this among themselves,
        and all of them mask the absent ones. Unmasking waits for no peer; CUDA: it waits for the device. Pending
        calls are lost: hooks that were not called do nothing, and earlier plans must no longer be used. The
        transport ``"process_group"`` has no such return, since a timeout ends the process group: there only masks that
        were set by hand can be cleared.

        CUDA graphs: a graph sees masks that are set or cleared after its capture; one captured while a rank was
        masked leaves that rank out for good. This method must not be called during a capture.

        Args:
            rank: The rank to mask or unmask; this rank itself only with ``masked=False``, to resynchronise it.
            masked: True to skip the rank, False to stop skipping it.

        Raises:
            ArgumentError: ``rank`` is outside [0, R), it is this rank and ``masked`` is True, or a CUDA graph is being
                captured.
            UnsupportedError: CUDA, across nodes over NCCL.
            ClosedError: the group was closed or is broken.
        """
        self._ready("mask")
        if type(rank) is not int or not 0 <= rank < self.num_ranks or (rank == self.rank and masked):
            outside = type(rank) is int and not 0 <= rank < self.num_ranks
            found = f"{rank!r}{f', outside [0, {self.num_ranks})' if outside else ''}"
            others = f"one of 0..{self.num_ranks - 1} other than this rank ({self.rank})"
            wanted = others if self.num_ranks > 1 else "another rank, of which a group of one has none"
            raise ArgumentError(f"mask: rank: expected {wanted}, got {found}")
        self._backend.mask(rank, masked=masked)

    def warmup(self) -> None:
        """Compile and load all kernels, so that no rank waits in a kernel for a peer that is still compiling.

        Contract: collective. Host: returns when every rank is ready. Call it once before the first call on a GPU, and
        before a CUDA graph is captured. Does nothing on the CPU backend. Masked ranks are left out; with
        ``on_timeout="mask"`` a rank that is late is masked.

        Raises:
            ArgumentError: a CUDA graph is being captured.
            MismatchError: a rank made another call.
            PeerTimeout: a rank did not answer in time.
            ClosedError: the group was closed or is broken.
        """
        self._ready("warmup")
        self._backend.warmup()

    def synchronize(self) -> None:
        """Wait until this rank's calls are done, and raise the error of one that failed. Local.

        Calls with ``counts="device"``, `redispatch`, `combine` and decode calls return before their work is done: their
        errors are raised here, or by the next call. Replays of CUDA graphs are not among them: call
        ``torch.cuda.synchronize()`` first to get their errors. Does nothing on the CPU backend.

        Raises:
            RoutingError, CapacityError, MismatchError, PeerTimeout: an earlier call failed with this error.
            ClosedError: the group was closed or is broken.
        """
        self._ready("synchronize")
        self._backend.synchronize()

    @without_function_modes
    def empty_rows(self, plan: Plan, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return uninitialised rows for `combine`, in memory that peers can read without a copy.

        Contract: local, returns at once. Optional: `combine` takes any tensor. Rows in other memory are pushed to their
        ranks (ROWS) or copied first (EXPERTS and MASKED). The rows that `dispatch` returns are in such memory too.

        Args:
            plan: The plan of the `dispatch` whose expert outputs these rows will hold.
            dtype: dtype of the rows: bfloat16, float16, float32 or float64.

        Returns:
            Tensor: shape of ``Dispatched.x``, with H columns.

        Raises:
            PlanError: the plan is another group's.
            ArgumentError: ``dtype`` is not one of these.
            ClosedError: the group was closed or is broken.
        """
        self._ready("empty_rows")
        try:
            self._resolver.empty_rows(plan, dtype)
            return self._backend.empty_rows(plan, dtype, self.shape.hidden)
        except _MAY_BE_REFUSALS as error:
            self._raise_if_refused("empty_rows", error, local=True)
            raise

    def _token_layout(self, topk_idx: Tensor, num_experts: int) -> TokenLayout:
        """Count the tokens for each rank and each expert; for `tokenferry.compat`."""
        return self._backend.token_layout(topk_idx, num_experts)

    def _restricted(self, topk_idx: Tensor, in_rank: Tensor, num_experts: int) -> Tensor:
        """Return a routing without the slots of ranks that ``in_rank`` leaves out; for `tokenferry.compat`."""
        return self._backend.restricted(topk_idx, in_rank, num_experts)

    def _call_sms(self) -> CallSms | None:
        """Return how many SMs calls occupy that do not say how many, or None on the CPU; for `tokenferry.compat`."""
        return self._backend.call_sms(self.shape)

    def _places_shape(self, options: DispatchOptions, num_tokens: int) -> tuple[int | None, int]:
        """Return the shape of ``Plan._places`` of a dispatch; None: its routing decides. Local."""
        return self._backend.places_shape(self.shape, options, num_tokens)

    @property
    def _num_host_sizes(self) -> int:
        """The length of ``Plan._host_sizes``."""
        return self._backend.num_host_sizes

    def close(self) -> None:
        """Free connections and memory. Local and idempotent; results stay valid; later calls raise ClosedError.

        Optional on the CPU backend: a group that is dropped frees its connections and memory.
        Blocks on GPUs until the device has done what was queued there, exchanges between nodes included, which have
        deadlines; and on the transport ``"process_group"``, for at most 5 s, if peers have yet to receive what a call
        with a hook sent.
        """
        self._backend.close()

    def __enter__(self: _Group) -> _Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f", {self._backend.broken}" if self._backend.broken else ""
        return (
            f"<ExpertGroup rank {self.rank} of {self.num_ranks}, {self.shape}, {self.backend}, "
            f"transport {self.transport}{state}>"
        )

    # ------------------------------------------------------------------ throughput: training, prefill

    @overload
    def dispatch(
        self, x: Tensor, routing: Routing, *, options: DispatchOptions | None = None, num_sms: int | None = None
    ) -> Dispatched[Tensor]: ...

    @overload
    def dispatch(
        self, x: Quantized, routing: Routing, *, options: DispatchOptions | None = None, num_sms: int | None = None
    ) -> Dispatched[Quantized]: ...

    @reports_interrupts
    def dispatch(
        self,
        x: Tensor | Quantized,
        routing: Routing,
        *,
        options: DispatchOptions | None = None,
        num_sms: int | None = None,
    ) -> Dispatched[Tensor] | Dispatched[Quantized]:
        """Send every token to each rank that holds one of its chosen experts.

        A token is sent once per *rank*, however many of its experts are there. Rows are bit-for-bit copies, always
        ordered by source rank, then source token (EXPERTS and MASKED: within each expert).

        Contract:
            Collective: yes; T may differ and may be 0; dtypes, K, S and ``options`` must be the same on all ranks.
            Host: CPU backend: returns when the rows have arrived. CUDA: ``counts="host"``: waits for the counts (about
                one round trip) without holding the GIL; ``counts="device"``: returns at once, unless ``capacity`` is
                below the worst case: then it also waits for the counts, to raise on every rank if rows do not fit.
            Stream: torch's current stream. Later work on it may overwrite ``x``.
            CUDA graph: capturable with ``counts="device"``. A captured call does not wait: an overflow of ``capacity``
                is raised by the next call that is not captured; nothing is written out of bounds.
            Gradient: none; use `tokenferry.autograd.dispatch`.

        Args:
            x: ``[T, H]`` bfloat16, float16, float32 or float64, contiguous, T <= M; or a `Quantized`.
            routing: ``topk_idx`` ``[T, K]`` and, if weights are to be sent, ``topk_weights`` ``[T, K]``.
            options: Layout, padding and location of the counts; None: ROWS with counts on the host.
            num_sms: SMs that the call may occupy; None: the number that ``tokenferry explain`` prints. CUDA only.

        Returns:
            Dispatched: rows, expert ids, weights, counts and the plan for `combine` and `redispatch`.

        Raises:
            ShapeError: an argument has the wrong shape, dtype, device or strides; names it.
            RoutingError: an index is outside [-1, E), or a token has experts on more nodes than ``MoeShape.max_nodes``;
                names its position. CUDA with ``counts="device"``: raised by the next call or by `synchronize`; no row
                is written out of bounds, and calls that were launched after the failed one are aborted.
            ArgumentError: rows or weights require grad, and gradients are enabled; ``num_sms`` is given on the CPU; a
                CUDA graph cannot capture this call.
            CapacityError: T > M, or rows did not fit into ``options.capacity`` (then on every rank). CUDA: the heap has
                no space for the rows; gives the numbers. docs/errors.md says when that breaks the group.
            ConfigError: backend cuda, a view of the group with E > 4096 or K > 64.
            MismatchError: ranks made different calls.
            PeerTimeout: a rank did not answer within ``timeout_s``; names the rank, the call and its number.
            ResourceError: the system refused memory, descriptors or the like; names the limit.
            ClosedError: the group was closed or is broken.

        Example:
            >>> import torch, tokenferry
            >>> shape = tokenferry.MoeShape(num_experts=2, top_k=1, hidden=4, max_tokens=8)
            >>> group = tokenferry.ExpertGroup(None, shape, backend="cpu")
            >>> x = torch.arange(12.0).reshape(3, 4)
            >>> by_expert = tokenferry.DispatchOptions(tokenferry.Layout.EXPERTS)
            >>> sent = group.dispatch(x, tokenferry.Routing(torch.tensor([[1], [0], [1]])), options=by_expert)
            >>> sent.expert_counts.tolist(), sent.x[:, 0].tolist()
            ([1, 2], [4.0, 0.0, 8.0])
        """
        if self._fast_path is not None:
            done = self._fast_path.dispatch(x, routing, options, num_sms)
            if done is not None:
                return done
        self._ready("dispatch")
        return self._backend.dispatch(self._resolver.dispatch(x, routing, options, num_sms))

    @overload
    def redispatch(
        self, x: Tensor, plan: Plan, *, topk_weights: Tensor | None = None, num_sms: int | None = None
    ) -> Dispatched[Tensor]: ...

    @overload
    def redispatch(
        self, x: Quantized, plan: Plan, *, topk_weights: Tensor | None = None, num_sms: int | None = None
    ) -> Dispatched[Quantized]: ...

    @reports_interrupts
    def redispatch(
        self,
        x: Tensor | Quantized,
        plan: Plan,
        *,
        topk_weights: Tensor | None = None,
        num_sms: int | None = None,
    ) -> Dispatched[Tensor] | Dispatched[Quantized]:
        """Send new rows to where an earlier `dispatch` sent its rows, without exchanging routing or counts again.

        Contract: as `dispatch`, but the counts are known: on CUDA it returns at once, and it is capturable with every
        plan. The backward of `combine` is this call.

        Args:
            x: As for `dispatch`, with the T of the plan; dtype and width may differ from those of the first rows.
            plan: The plan of a `dispatch` or `redispatch` of this group.
            topk_weights: ``[T, K]`` float32 to send with the rows, or None.
            num_sms: As for `dispatch`.

        Returns:
            Dispatched: as from `dispatch`; its plan is ``plan``.

        Raises:
            PlanError: the plan is another group's.
            ArgumentError, CapacityError, ShapeError, MismatchError, PeerTimeout, ResourceError, ClosedError: as
                `dispatch`.
        """
        if self._fast_path is not None:
            done = self._fast_path.redispatch(x, plan, topk_weights, num_sms)
            if done is not None:
                return done
        self._ready("redispatch")
        return self._backend.redispatch(self._resolver.redispatch(x, plan, topk_weights, num_sms))

    @reports_interrupts
    def combine(
        self,
        y: Tensor,
        plan: Plan,
        *,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, ...] | None = None,
        out: Tensor | None = None,
        num_sms: int | None = None,
    ) -> Combined:
        """Return every row to the rank of its token and add up the rows of each token.

        Numerics: the sum starts with the biases (0 without any) and adds one partial sum per rank in rank order. With
        EXPERTS and MASKED a rank's partial sum adds its experts' rows in expert order. All sums are in float32
        (float64 rows: float64) with one rounding at the end, and bitwise reproducible. With several nodes the sum of
        each node is rounded to y's dtype before it crosses, and these are added in node order and rounded once more.
        Gate weights are not applied.

        Contract:
            Collective: yes.
            Host: CPU backend: returns when the sums are complete. CUDA: returns at once, on torch's current stream;
                rows in memory that peers cannot read (see `empty_rows`) are pushed; EXPERTS and MASKED: copied first.
            CUDA graph: capturable.
            Gradient: none; use `tokenferry.autograd.combine`.

        Args:
            y: The experts' outputs in the layout of ``Dispatched.x``: ``[N, H]``, ``[rows, H]`` or ``[L, capacity,
                H]``, contiguous; bfloat16, float16, float32 or float64; rows past the counts are not read.
            plan: The plan of a `dispatch` or `redispatch` of this group; not consumed.
            topk_weights: float32 in the shape of ``Dispatched.topk_weights``, to be returned with the rows and added up
                per slot; the backward of `dispatch` needs it.
            bias: One or two ``[T, H]`` tensors of y's dtype, with which the sum starts.
            out: The tensor to write to: ``[T, H]`` of y's dtype, contiguous; None: a new tensor.
            num_sms: As for `dispatch`.

        Returns:
            Combined: ``x`` ``[T, H]`` and, if weights were given, ``topk_weights`` ``[T, K]``.

        Raises:
            PlanError: the plan is another group's.
            ArgumentError: as `dispatch`; or there are more than two biases.
            CapacityError: CUDA: the heap is too small for the rows that return, or for copies; gives the numbers.
            ShapeError, MismatchError, PeerTimeout, ResourceError, ClosedError: as `dispatch`.
        """
        if self._fast_path is not None:
            done = self._fast_path.combine(y, plan, topk_weights, bias, out, num_sms)
            if done is not None:
                return done
        self._ready("combine")
        return self._backend.combine(self._resolver.combine(y, plan, topk_weights, bias, out, num_sms))

    # ------------------------------------------------------------------ latency: decoding

    @overload
    def decode_dispatch(
        self,
        x: Tensor,
        routing: Routing,
        *,
        quantize: None = None,
        stats: DecodeStats | None = None,
        return_hook: bool = False,
    ) -> DecodeDispatched[Tensor]: ...

    @overload
    def decode_dispatch(
        self,
        x: Tensor,
        routing: Routing,
        *,
        quantize: Scale,
        stats: DecodeStats | None = None,
        return_hook: bool = False,
    ) -> DecodeDispatched[Quantized]: ...

    @reports_interrupts
    def decode_dispatch(
        self,
        x: Tensor,
        routing: Routing,
        *,
        quantize: Scale | None = None,
        stats: DecodeStats | None = None,
        return_hook: bool = False,
    ) -> DecodeDispatched[Tensor] | DecodeDispatched[Quantized]:
        """Send every token to its experts, into a layout whose shape does not depend on the routing.

        Contract:
            Collective: yes; T may differ and may be 0; ``return_hook`` may differ. ``hook()`` is local. Any number of
                results may be alive at once.
            Host: CPU backend: returns when the rows have arrived; with ``return_hook=True`` when they have been sent,
                and ``hook()`` waits for them; across nodes until the ranks of this node have called theirs or made
                another call. CUDA: returns at once, and so does ``hook()``; the first decode call of
                these sizes allocates memory together with the ranks that are not masked, and waits for them for at
                most ``timeout_s``, across nodes once for those of its node and once for the others.
            Stream: CUDA: torch's current stream, on all SMs. With ``return_hook=True`` the call only sends, ``hook()``
                receives on the stream that is current then, and no SM is occupied in between. Any number of hooks may
                be pending: before a third call overwrites rows that have not been received, the oldest are received;
                across nodes the next call, of any kind, receives them.
                Later work on the stream may overwrite ``x``; the plan refers to the routing's tensors, which have to
                stay unchanged until the last combine with it has been received.
            CUDA graph: capturable after one such call outside of the graph. A call and its hook belong in the same
                capture. Replays may use new data; rows of ``topk_idx`` that are all -1 stand for missing tokens. No
                hook of a call outside of the graph may be pending while it is captured or replayed.
            Gradient: none.

        Args:
            x: ``[T, H]`` bfloat16, float16 or float32, contiguous, T <= M.
            routing: As for `dispatch`. `decode_combine` needs ``topk_weights``; they may also be put into the plan
                later, with ``dataclasses.replace(plan, topk_weights=...)``.
            quantize: How to store the scales of rows that are cast to float8_e4m3fn, with one scale per row and 128
                columns (``scale = max(amax, 1e-4) / 448``, the format that DeepEP and DeepGEMM use). H has to be a
                multiple of 16, so that a row of bytes is one of 16 bytes. A NaN or an
                infinity arrives as NaN (the byte 0x7F); the other columns arrive as if it were 0. None: rows are sent
                unchanged (CUDA: 16 bytes with all bits set, which are NaNs, may lose their lowest bit).
            stats: Counters to add to.
            return_hook: Return after sending; the caller receives with ``hook()``.

        Returns:
            DecodeDispatched: ``x`` ``[L, R*M, H]``, ``expert_counts``, the plan and the hook.

        Raises:
            RoutingError: an index is outside [-1, E), or a token has experts on too many nodes, as in `dispatch`. CUDA:
                raised by the next call, by ``hook()`` or by `synchronize`; neither that call nor those launched after
                it have sent anything: make all of them again. CUDA across nodes: such an index counts as -1, a token
                goes to all its nodes, and the call is made; raised likewise.
            CapacityError: T > M; across nodes: a rank has more tokens for another node than ``MoeShape.node_slots`` (on
                every rank; with a hook, the hook raises; CUDA: the next call, or `synchronize`); CUDA: a rank's heap is
                too small for the rows (then on every rank).
            ArgumentError: rows or weights require grad, or ``quantize`` is no `Scale`.
                CUDA: a graph cannot capture this; names the call to make before. Or a rank takes
                part that was masked when the memory for these calls was made; says how it comes back.
            ConfigError: backend cuda, E > 4096, K > 64, or M > 65536; across nodes, R * M > 524288.
            ShapeError, MismatchError, PeerTimeout, ResourceError, ClosedError: as `dispatch`.
        """
        if self._fast_path is not None:
            done = self._fast_path.decode_dispatch(x, routing, quantize, stats, return_hook=return_hook)
            if done is not None:
                return done
        self._ready("decode_dispatch")
        request = self._resolver.decode_dispatch(x, routing, quantize, stats, return_hook=return_hook)
        return self._backend.decode_dispatch(request)

    @reports_interrupts
    def decode_combine(  # seven parameters instead of six: numerics and encoding are chosen independently
        self,
        y: Tensor,
        plan: DecodePlan,
        *,
        numerics: Numerics = "exact",
        encoding: EncodingName = "same",
        out: Tensor | None = None,
        stats: DecodeStats | None = None,
        return_hook: bool = False,
    ) -> DecodeCombined:
        """Return the experts' outputs to the ranks of their tokens, and add them up with the gate weights of the plan.

        Numerics: ``"exact"``: every expert's row is sent; ``sum_k weight[k] * row[k]`` in slot order in float32, each
        product and each sum rounded to float32, one rounding to y's dtype at the end. ``"fast"``: each rank sums its
        experts' weighted rows in expert order in float32, rounds to y's dtype and sends one row per token; these are
        added in rank order in float32 and rounded once more: fewer bytes, one extra rounding per rank. With several
        nodes each node makes such a sum of its experts, rounded to y's dtype; these are added in node order in float32
        and rounded once more. Backend cpu: not while ranks are masked, nor with ``on_timeout="mask"``.

        Encoding: the rows in transit (``"exact"``: each expert's row; ``"fast"``: each rank's sum, after rounding to
        y's dtype; with several nodes: each node's sum, and nothing else) are encoded by their sender and decoded to
        float32 by their receiver; the rest is as above. A rank's own rows are encoded too, so that the sum does not
        depend on which rank holds an expert. ``"same"``: rows are sent unchanged; ``"fp8"``: float8_e4m3fn with a
        float32 scale per row and 128 columns, see `tokenferry.formats.fp8`; ``"logfmt10"``: 10 bits a number, with a
        logarithmic range per row and 128 columns, see `tokenferry.formats.logfmt`; where two codes are nearly equally
        near, a backend may take either. In both a NaN or an infinity arrives as NaN, and the other columns as if it
        were 0. docs/concepts.md gives the precision of each.

        Contract: as `decode_dispatch`: collective, hooks, CUDA graphs. The plan is not consumed. ``y`` may be in any
        memory and is read once. Later work on the stream may overwrite it, even while the hook is pending.

        Args:
            y: ``[L, R*M, H]`` bfloat16, float16 or float32, contiguous; rows past the counts are not read.
            plan: The plan of a `decode_dispatch` of this group, with ``topk_weights``.
            numerics: ``"exact"`` or ``"fast"``; the same on all ranks.
            encoding: ``"same"``, ``"fp8"`` or ``"logfmt10"``; the same on all ranks. The latter two need H to be a
                multiple of 128.
            out: The tensor to write to: ``[T, H]`` of y's dtype, contiguous; None: a new tensor.
            stats: Counters to add to; ``received`` must be None.
            return_hook: Return after sending; the caller receives with ``hook()``.

        Returns:
            DecodeCombined: ``x`` ``[T, H]`` and the hook.

        Raises:
            PlanError: the plan is another group's, has no weights, or has rows that a hook has yet to receive (CUDA
                across nodes: they are received first).
            ArgumentError: ``numerics`` or ``encoding`` is not one of these, or ``encoding`` needs H to be a multiple of
                128; rows or weights require grad; ``stats.received`` is given; CUDA: a graph cannot capture this.
            CapacityError: CUDA: as `decode_dispatch`, if the rows of y are larger than those of x.
            ShapeError, MismatchError, PeerTimeout, ResourceError, ClosedError: as `dispatch`.
        """
        if self._fast_path is not None:
            done = self._fast_path.decode_combine(y, plan, numerics, encoding, out, stats, return_hook=return_hook)
            if done is not None:
                return done
        self._ready("decode_combine")
        request = self._resolver.decode_combine(y, plan, numerics, encoding, out, stats, return_hook=return_hook)
        return self._backend.decode_combine(request)

    def _adopt(
        self,
        backend: Backend,
        shape: MoeShape,
        timeout_s: float,
        *,
        process_group: dist.ProcessGroup | None = None,
        origin: ExpertGroup | None = None,
    ) -> None:
        self._backend = backend
        self.process_group = process_group
        self._narrow: ExpertGroup | None = None  # see `autograd.common.for_weights`
        self._origin = origin  # keeps the registered group alive as long as any view of it
        if origin is None:
            _groups[backend.key] = self
        self._resolver = Resolver(shape, backend.topology, backend.device, backend.key, backend.checks_routing)
        self._interruptible = backend.interruptible
        self._fast_path = backend.fast_path(shape, self._resolver)
        self.shape, self.timeout_s = shape, timeout_s

    def _ready(self, call: str) -> None:
        if self._backend.broken:
            raise ClosedError(f"{call}: the group {self._backend.broken}; make a new ExpertGroup")

    def _cut_off(self, call: str, before: object, error: BaseException) -> None:
        """Handle an ``error`` that has ended a call; raise a `ResourceError` instead if a resource was refused."""
        if isinstance(error, TokenferryError):
            return
        self._interruptible.interrupted(call, before, error)
        if isinstance(error, _MAY_BE_REFUSALS):
            self._raise_if_refused(call, error)

    def _raise_if_refused(self, call: str, error: Exception, *, local: bool = False) -> None:
        refused = None if isinstance(error, TokenferryError) else self._backend.refused(call, error, local=local)
        try:
            if refused is not None:
                raise refused from error
        finally:
            del refused, error  # their tracebacks refer to this frame, and keep the memory of calls alive


def find_group(key: str, shape: MoeShape) -> ExpertGroup:
    """Return the live group with this key, for these sizes. Local.

    Raises:
        ClosedError: the group has been garbage collected.
    """
    group = _groups.get(key)
    if group is None:
        raise ClosedError(f"group {key} is gone: nothing but a compiled graph refers to it; keep the ExpertGroup")
    return group if group.shape == shape else group.for_shape(shape)
