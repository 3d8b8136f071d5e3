"""The seam between `api` and the backends: their protocol, and requests in which everything is checked and resolved."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenferry.errors import PlanError, ResourceError
from tokenferry.topology import Topology
from tokenferry.types import (
    Combined,
    DecodeCombined,
    DecodeDispatched,
    DecodePlan,
    DecodeStats,
    Dispatched,
    DispatchOptions,
    MoeShape,
    Plan,
    Quantized,
    Routing,
    Scale,
)


class Encoding(enum.IntEnum):
    """The format of rows on the way in `decode_combine`; named as the argument ``encoding`` names it."""

    same = 0
    fp8 = 1
    logfmt10 = 2


@dataclass(frozen=True, slots=True)
class Resolved:
    """The options of a group, all decided.

    Attributes:
        shape: The sizes all ranks agree on.
        backend: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        transport: How CPU ranks reach each other, which backend cuda ignores; or ``"nvshmem"``.
        network: What carries decode calls between nodes of GPUs: ``"nccl"`` or ``"nvshmem"``.
        put_bytes: GPU memory that other nodes put decode calls into; None: for the shape.
        timeout_s: Seconds that any wait for a peer may take.
        mask_on_timeout: Decode calls mask a silent rank instead of raising.
        heap_bytes: GPU memory for rows that peers write or read; None: chosen by the backend, for the shape.
        cache_folder: Where compiled kernels are kept.
        fast_path: Whether calls may take the `FastPath`.
        ranks_per_node: Consecutive ranks that form a node; None: the ranks of a host do.
        arch: What kernels are compiled for; None: for the GPU.
        cpu_only: Why only the CPU backend can honour an option of this rank; empty if there is none.
        cuda_only: Why only the CUDA backend can.
    """

    shape: MoeShape
    backend: str
    transport: str
    timeout_s: float
    mask_on_timeout: bool
    heap_bytes: int | None
    cache_folder: str
    fast_path: bool = True
    ranks_per_node: int | None = None
    arch: str | None = None
    cpu_only: str = ""
    cuda_only: str = ""
    network: str = "nccl"
    put_bytes: int | None = None

    @property
    def terms(self) -> dict[str, object]:
        """What ranks compare in their first exchange, whichever backend they try: each begins with another one."""
        return {"backend": self.backend}


@dataclass(frozen=True, slots=True, eq=False)
class DispatchRequest:
    """Rows and their routing; the backend makes the plan."""

    shape: MoeShape
    x: Tensor | Quantized
    routing: Routing
    options: DispatchOptions
    num_sms: int | None


@dataclass(frozen=True, slots=True, eq=False)
class RedispatchRequest:
    """New rows, and perhaps new weights, along an existing plan."""

    shape: MoeShape
    x: Tensor | Quantized
    topk_weights: Tensor | None
    plan: Plan
    num_sms: int | None


@dataclass(frozen=True, slots=True, eq=False)
class CombineRequest:
    """Rows to send back and add up; ``out`` is where the sums go."""

    y: Tensor
    plan: Plan
    topk_weights: Tensor | None
    biases: tuple[Tensor, ...]
    out: Tensor | None
    num_sms: int | None


@dataclass(frozen=True, slots=True, eq=False)
class DecodeDispatchRequest:
    """Rows to put into the masked layout; ``quantize``: how they are cast to FP8, None: they are not."""

    shape: MoeShape
    x: Tensor
    routing: Routing
    quantize: Scale | None
    stats: DecodeStats
    return_hook: bool


@dataclass(frozen=True, slots=True, eq=False)
class DecodeCombineRequest:
    """Expert outputs in the masked layout; ``fast``: each rank adds up its rows of a token before it sends them.

    ``encoding``: the format of rows on the way, own rows included; with another than ``same``, H is a multiple of 128.
    """

    shape: MoeShape
    y: Tensor
    plan: DecodePlan
    fast: bool
    encoding: Encoding
    out: Tensor | None
    stats: DecodeStats
    return_hook: bool


@dataclass(frozen=True, slots=True, eq=False)
class TokenLayout:
    """Where the tokens of a rank go.

    Attributes:
        per_rank: ``[R]`` int32: tokens for each rank; a token counts once per rank.
        per_node: ``[nodes]`` int32: tokens for each node, once each; None for one node, and from the CPU backend.
        per_expert: ``[E]`` int32: tokens for each expert.
        in_rank: ``[T, R]`` bool: whether a token goes to a rank.
    """

    per_rank: Tensor
    per_node: Tensor | None
    per_expert: Tensor
    in_rank: Tensor


@dataclass(frozen=True, slots=True)
class CallSms:
    """How many SMs calls occupy that do not say how many.

    Attributes:
        dispatch: SMs of `dispatch` and `redispatch`.
        combine: SMs of `combine` for rows that peers fetch.
    """

    dispatch: int
    combine: int


class QuickChecks(Protocol):
    """Checks of arguments that take a microsecond and give no messages: False means that full checks must decide."""

    def dispatch_looks_right(self, x: Any, routing: Any, options: Any) -> bool:  # noqa: ANN401 - arguments of a user
        """Return whether the arguments of a dispatch are certainly right."""
        ...

    def rows_look_right(self, x: Any, num_tokens: int) -> bool:  # noqa: ANN401
        """Return whether ``x`` is certainly rows or a `Quantized` for T tokens."""
        ...

    def decode_dispatch_looks_right(self, x: Any, routing: Any, quantize: Any) -> bool:  # noqa: ANN401
        """Return whether the arguments of a decode dispatch are certainly right."""
        ...

    def decode_rows_look_right(self, y: Any, rows: tuple[int, ...]) -> bool:  # noqa: ANN401
        """Return whether ``y`` is certainly ``[*rows, H]`` that a decode combine takes."""
        ...

    def out_looks_right(self, out: Any, num_tokens: int, dtype: torch.dtype) -> bool:  # noqa: ANN401
        """Return whether ``out`` is certainly ``[T, H]`` of a dtype."""
        ...

    def sums_look_right(self, y: Any, rows: tuple[int, ...]) -> bool:  # noqa: ANN401
        """Return whether ``y`` is certainly ``[*rows, H]`` that combine takes."""
        ...

    def weights_look_right(self, weights: Any, shape: tuple[int, ...]) -> bool:  # noqa: ANN401
        """Return whether ``weights`` is certainly float32 of this shape."""
        ...

    def stats_look_right(self, stats: Any) -> bool:  # noqa: ANN401
        """Return whether ``stats`` is certainly a `DecodeStats` of tensors that a decode dispatch takes."""
        ...


class FastPath(Protocol):
    """Calls without full checks: each method makes the call, or returns None, having done nothing.

    The arguments are those of the call of the same name in `tokenferry.api`, unchecked.
    """

    def dispatch(self, x: Any, routing: Any, options: Any, num_sms: Any) -> Dispatched[Any] | None: ...  # noqa: ANN401, D102
    def redispatch(self, x: Any, plan: Any, topk_weights: Any, num_sms: Any) -> Dispatched[Any] | None: ...  # noqa: ANN401, D102

    def combine(  # noqa: D102
        self,
        y: Any,  # noqa: ANN401
        plan: Any,  # noqa: ANN401
        topk_weights: Any,  # noqa: ANN401
        bias: Any,  # noqa: ANN401
        out: Any,  # noqa: ANN401
        num_sms: Any,  # noqa: ANN401
    ) -> Combined | None: ...

    def decode_dispatch(  # noqa: D102
        self,
        x: Any,  # noqa: ANN401
        routing: Any,  # noqa: ANN401
        quantize: Any,  # noqa: ANN401
        stats: Any,  # noqa: ANN401
        *,
        return_hook: bool,
    ) -> DecodeDispatched[Any] | None: ...

    def decode_combine(  # noqa: D102
        self,
        y: Any,  # noqa: ANN401
        plan: Any,  # noqa: ANN401
        numerics: Any,  # noqa: ANN401
        encoding: Any,  # noqa: ANN401
        out: Any,  # noqa: ANN401
        stats: Any,  # noqa: ANN401
        *,
        return_hook: bool,
    ) -> DecodeCombined | None: ...


def no_hook() -> None:
    """Do nothing: the hook of a decode call that has received its rows already."""


def not_received() -> PlanError:
    """Return the error of a combine along a plan that a pending hook has yet to fill."""
    return PlanError(
        "decode_combine: plan: its rows have not been received; call the hook() of its decode_dispatch first"
    )


CLOSED = "was closed"
"""The value of `Backend.broken` after the program has closed the group."""


class Interruptible(Protocol):
    """Handles an exception after the last message of a call, when this rank is a call ahead of its caller.

    Attributes:
        latest_call: The call that has begun last, or what stands for it.
    """

    @property
    def latest_call(self) -> Any: ...  # noqa: ANN401, D102 - known to the backend only

    def interrupted(self, call: str, before: Any, error: BaseException) -> None:  # noqa: ANN401 - likewise
        """Break the group if anything was sent since `latest_call` was ``before``; may raise another error."""


class Backend(Protocol):
    """One way to move rows between ranks. Calls are collective; one that fails breaks the backend.

    Attributes:
        name: ``"cpu"`` or ``"cuda"``.
        transport: How ranks reach each other.
        why: Why this backend and transport were chosen.
        key: Key of the group, the same on all ranks; its plans carry it.
        rank: This rank.
        num_ranks: Number of ranks, R.
        topology: The nodes.
        device: Device of all tensors.
        checks_routing: Whether indices outside [-1, E), and tokens that go to more nodes than the shape allows, are
            found where the rows are, so that the host need not check.
        num_host_sizes: Length of ``Plan._host_sizes``.
        interruptible: Handles exceptions that are raised before a call has returned.
    """

    name: str
    transport: str
    why: str
    key: str
    rank: int
    num_ranks: int
    topology: Topology
    device: torch.device
    checks_routing: bool
    num_host_sizes: int

    @property
    def interruptible(self) -> Interruptible: ...  # noqa: D102 - above

    @property
    def broken(self) -> str | None:
        """The reason why the backend ended, or None: `CLOSED`, ``"is broken by ..."``, ``"belongs to ..."``.

        The last is that of a forked child: the backend, or what it is made of, calls `forked.forget_in_child`.
        """

    # Calls are documented once, in tokenferry.api.
    def dispatch(self, request: DispatchRequest) -> Dispatched[Any]: ...  # noqa: D102
    def redispatch(self, request: RedispatchRequest) -> Dispatched[Any]: ...  # noqa: D102
    def combine(self, request: CombineRequest) -> Combined: ...  # noqa: D102
    def decode_dispatch(self, request: DecodeDispatchRequest) -> DecodeDispatched[Any]: ...  # noqa: D102
    def decode_combine(self, request: DecodeCombineRequest) -> DecodeCombined: ...  # noqa: D102
    def warmup(self) -> None: ...  # noqa: D102
    def synchronize(self) -> None: ...  # noqa: D102
    def empty_rows(self, plan: Plan, dtype: torch.dtype, hidden: int) -> Tensor: ...  # noqa: D102
    def mask(self, rank: int, *, masked: bool) -> None: ...  # noqa: D102
    def masked(self) -> frozenset[int]: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102

    def fast_path(self, shape: MoeShape, checks: QuickChecks) -> FastPath | None:
        """Return the fast path of a view of the group with these sizes; None if the backend has none."""
        ...

    def refused(self, call: str, error: Exception, *, local: bool = False) -> ResourceError | None:
        """Return the error to raise in place of one that a call met because a resource was refused, else None.

        Breaks the backend if its peers wait for this rank; after a ``local`` call they do not.
        """
        ...

    def write_masks(self, out: Tensor) -> None:
        """Set ``out`` ``[R]`` int32 to 1 for each rank that decode calls skip, and to 0 for the others.

        CUDA: in the order of the current stream, so that it covers what the calls before find.
        """

    def scratch(self, num_bytes: int) -> Tensor:
        """Return ``[num_bytes]`` uint8, undefined, which no call uses while it is alive. Local.

        It is memory of the group if enough is free there, otherwise of torch.
        """
        ...

    def places_shape(self, shape: MoeShape, options: DispatchOptions, num_tokens: int) -> tuple[int | None, int]:
        """Return the shape of ``Plan._places`` of a dispatch of T tokens; None: its routing decides."""
        ...

    def token_layout(self, topk_idx: Tensor, num_experts: int) -> TokenLayout:
        """Count the tokens of this rank for each rank, expert and node. Local; never waits for a GPU.

        Args:
            topk_idx: ``[T, K]`` int64 or int32, contiguous; indices outside [0, E) count nowhere.
            num_experts: E, a multiple of R.
        """
        ...

    def restricted(self, topk_idx: Tensor, in_rank: Tensor, num_experts: int) -> Tensor:
        """Return a routing without the slots of ranks that ``in_rank`` leaves out: they are -1. Local.

        Never waits for a GPU. Indices outside [0, E) stay as they are.

        Args:
            topk_idx: ``[T, K]`` int64 or int32, contiguous.
            in_rank: ``[T, R]`` bool, contiguous.
            num_experts: E, a multiple of R.
        """
        ...

    def call_sms(self, shape: MoeShape) -> CallSms | None:
        """Return how many SMs calls of this shape occupy that do not say how many; None: the device has none. Local."""
        ...

    def new_traces(self, num_calls: int) -> Tensor | None:
        """Return tensors for the time stamps of several decode calls, all zero; None if the backend has none.

        Returns:
            Tensor: ``[num_calls, blocks, words]`` int64.
        """
        ...

    def set_trace(self, trace: Tensor | None) -> None:
        """Make the decode calls from now on write time stamps; None: they do not, which costs nothing.

        Contract: local; returns at once. The time stamps of a call are there when its stream has passed it. The tensor
        has to live until then, and, if a CUDA graph captures the call, as long as the graph.

        Args:
            trace: One of the tensors that `new_traces` returned.

        Raises:
            BackendUnavailable: the backend has no time stamps.
        """
        ...
