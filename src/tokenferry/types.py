"""The arguments and results of tokenferry's calls: frozen dataclasses and names of options, without behaviour.

The letters used in every docstring:

====== =====================================================================================
R      ranks in the group; a *rank* is one process
T      tokens on this rank; may differ between ranks, and may be 0
M      the most tokens any rank may pass to a call, the same on all: ``MoeShape.max_tokens``
H      hidden size
E, L   experts in total; experts on this rank, L = E / R; rank r holds r*L .. r*L+L-1
K      choices per token; -1 in ``topk_idx`` means "slot unused"
N      rows received on this rank
S      scales per row of a ``Quantized``
A      expert alignment, in rows
====== =====================================================================================

*row*: the data of one token in one place. *plan*: a record of where a dispatch sent its rows; combine needs it.

A result shares tensors with its plan, and so with later results along the same plan: ``topk_idx``, ``expert_counts``
and ``expert_offsets``. While the plan is in use they must not be changed in place, but as a copy: later calls along it
would go wrong silently. The rows of a result and their weights may be overwritten.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from tokenferry.errors import ConfigError

BackendName = Literal["auto", "cpu", "cuda"]
"""``ExpertGroup(backend=...)``."""

TransportName = Literal["auto", "shared_memory", "process_group", "nvshmem"]
"""``ExpertGroup(transport=...)``."""

TimeoutPolicy = Literal["raise", "mask"]
"""``ExpertGroup(on_timeout=...)``."""

CountsLocation = Literal["host", "device"]
"""``DispatchOptions(counts=...)``."""

Numerics = Literal["exact", "fast"]
"""``ExpertGroup.decode_combine(numerics=...)``."""

EncodingName = Literal["same", "fp8", "logfmt10"]
"""``ExpertGroup.decode_combine(encoding=...)``."""

MAX_SIZE = 2**31 - 1
"""The largest number that a size, an alignment or a capacity may be: kernels and messages count in 32 bits."""


SIZES = ("num_experts", "top_k", "hidden", "max_tokens")
"""The sizes that a `MoeShape` needs, in order."""


class Layout(enum.Enum):
    """The arrangement in which `dispatch` delivers the rows that a rank receives.

    Attributes:
        ROWS: ``[N, H]``: one row per (token, rank), by source rank, then source token.
        EXPERTS: ``[rows, H]``: one row per (token, local expert), grouped by expert; each group starts at a multiple of
            A.
        MASKED: ``[L, capacity, H]``: the rows of expert e are ``[e, :expert_counts[e]]``.
    """

    ROWS = "rows"
    EXPERTS = "experts"
    MASKED = "masked"


class Scale(enum.Enum):
    """The format of the scales of an FP8 cast: one per row and 128 columns; amax: their largest finite magnitude.

    If H is no multiple of 128, the last group of a row has fewer columns.

    Attributes:
        FLOAT32: ``amax / 448``; amax is at least 1e-4. ``Quantized.scale`` is ``[..., ceil(H / 128)]`` float32.
        POWER_OF_TWO: The same, rounded up to a power of two; likewise float32.
        UE8M0: The same power of two as its exponent byte, four to an int32, lowest byte first: ``[..., ceil(H / 512)]``
            int32; bytes beyond the last group are 0.
    """

    FLOAT32 = "float32"
    POWER_OF_TWO = "power_of_two"
    UE8M0 = "ue8m0"


@dataclass(frozen=True, slots=True)
class MoeShape:
    """The sizes of a group, the same on all its ranks.

    Args:
        num_experts: E, a multiple of R.
        top_k: K, choices per token. It may exceed E, since slots may be unused (-1), and experts may repeat in a row;
            routers, and the commands of the library, choose at most E.
        hidden: H, elements in a row. A row of data must be a multiple of 16 bytes.
        max_tokens: M, the most tokens any rank may pass to one call.
        max_nodes: The most nodes that the experts of a token may lie on, its own node counted like any other; None: any
            number. Dispatches refuse a routing that exceeds it, so that it bounds the rows that a rank sends to other
            nodes. It reserves nothing; with counts on the device, where M rows cross to each other node in any case, it
            saves nothing either. On one node it has no effect.
        node_slots: Decode calls across nodes: the most tokens of a rank that may go to the same other node; None: M.
            With fewer, buffers for the network are smaller, and a call in which a rank has more raises on all ranks. On
            one node it has no effect.

    Raises:
        ConfigError: a size is not a positive integer, or above 2147483647.
    """

    num_experts: int
    top_k: int
    hidden: int
    max_tokens: int
    max_nodes: int | None = None
    node_slots: int | None = None

    def __post_init__(self) -> None:
        for name in SIZES:
            _check_positive(f"MoeShape: {name}", getattr(self, name))
        for name in ("max_nodes", "node_slots"):
            value = getattr(self, name)
            if value is not None:
                _check_positive(f"MoeShape: {name}", value, " or None")


def _check_positive(what: str, value: object, or_none: str = "") -> None:
    """Raise ConfigError unless ``value`` is an integer from 1 to `MAX_SIZE`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{what}: expected a positive integer{or_none}, got {value!r}")
    if value > MAX_SIZE:
        raise ConfigError(f"{what}: expected at most {MAX_SIZE}, got {value}")


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """Rows with their scales; both are moved as bytes, without being interpreted.

    Args:
        data: ``[T, W]`` of any dtype and width (packed formats hold several elements in one), contiguous; a row
            must be a multiple of 16 bytes.
        scale: ``[T, S]`` of any dtype and any strides; any S, also 0.
    """

    data: Tensor
    scale: Tensor


Rows_co = TypeVar("Rows_co", bound=Tensor | Quantized, covariant=True)
"""The type of the rows of a result: the type of the rows sent, or `Quantized` if the call casts them."""


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The router's choice for each token.

    Args:
        topk_idx: ``[T, K]`` int64 or int32 in ``[-1, E)``; -1: slot unused. An expert may repeat in a row: the
            token is still sent to it once, with the sum of the weights.
        topk_weights: ``[T, K]`` float32, or None to send none.

    Both contiguous, on the device of the group.
    """

    topk_idx: Tensor
    topk_weights: Tensor | None = None


class _Remembers:
    """A place for a hash, which is no field."""

    __slots__ = ("_hash",)

    _hash: int


@dataclass(frozen=True, slots=True)
class DispatchOptions(_Remembers):
    """Options of `dispatch`; the same on every rank.

    Args:
        layout: The arrangement of the received rows.
        alignment: A (EXPERTS only): each expert's rows start at a multiple of A.
        zero_padding: Fill the padding with zeros instead of leaving it undefined (EXPERTS and MASKED): the rows between
            an expert's count and the alignment or capacity.
        counts: ``"host"``: the call waits until N is known, and results have exactly N rows. ``"device"``: results have
            ``capacity`` rows, counts stay in tensors, and rows past the count hold no data.
        capacity: Rows to reserve memory for (MASKED: per expert). None: the worst case, R*M for ROWS, R*M*min(K, L)
            plus padding for EXPERTS, R*M per expert for MASKED. With ``counts="host"`` only MASKED takes one.
            Below the worst case an overflow raises `CapacityError` on every rank.

    Raises:
        ConfigError: the options contradict each other, or a number is not a positive integer up to 2147483647.
    """

    layout: Layout = Layout.ROWS
    alignment: int = 1
    zero_padding: bool = False
    counts: CountsLocation = "host"
    capacity: int | None = None

    def __hash__(self) -> int:
        """Remember the hash: each call looks its options up, and that of a dataclass takes a microsecond."""
        try:
            return self._hash
        except AttributeError:  # the first time, and in a copy
            known = hash((self.layout, self.alignment, self.zero_padding, self.counts, self.capacity))
            object.__setattr__(self, "_hash", known)
            return known

    def __post_init__(self) -> None:
        if not isinstance(self.layout, Layout):
            raise ConfigError(f"DispatchOptions: layout: expected a Layout, got {self.layout!r}; e.g. Layout.EXPERTS")
        if self.counts not in ("host", "device"):
            raise ConfigError(f'DispatchOptions: counts: expected "host" or "device", got {self.counts!r}')
        _check_positive("DispatchOptions: alignment", self.alignment)
        if self.alignment != 1 and self.layout is not Layout.EXPERTS:
            raise ConfigError(f"DispatchOptions: alignment={self.alignment} needs Layout.EXPERTS, got {self.layout}")
        if not isinstance(self.zero_padding, bool):
            raise ConfigError(f"DispatchOptions: zero_padding: expected True or False, got {self.zero_padding!r}")
        if self.zero_padding and self.layout is Layout.ROWS:
            raise ConfigError(
                "DispatchOptions: zero_padding needs Layout.EXPERTS or Layout.MASKED; Layout.ROWS has no padding"
            )
        if self.capacity is not None:
            _check_positive("DispatchOptions: capacity", self.capacity, " or None")
        if self.capacity is not None and self.counts == "host" and self.layout is not Layout.MASKED:
            raise ConfigError(
                'DispatchOptions: capacity with counts="host" needs Layout.MASKED; the others return exactly N rows'
            )


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A record of where one dispatch sent its rows; reusable for any number of calls. Plain data, without the group.

    With ``counts="device"``, N below is the capacity in received (token, rank) rows (R*M, or for ROWS the ``capacity``
    of the options), and only the first ``src_counts.sum()`` entries are meaningful.

    Attributes:
        group_key: Key of the group that made the plan; groups made by `ExpertGroup.for_shape` share one key.
        options: The options of the dispatch.
        num_tokens: T of this rank.
        num_received: N, rows received on this rank, or None with ``counts="device"``.
        num_delivered: Rows in the first axis of ``Dispatched.x`` (MASKED: L * capacity).
        dst_token: ``[rows sent]`` int64: this rank's token in each row that it sent, by destination, then token.
        dst_counts: ``[R]`` int64: rows sent to each rank.
        src_token: ``[N]`` int64: the token, on its source rank, of each row received.
        src_counts: ``[R]`` int64: rows received from each rank.
        topk_idx: ``[N, K]``, dtype of the routing: local expert of each slot, -1 if the expert is on another rank.
        row_idx: EXPERTS and MASKED: ``[N, K]`` int64: the delivered row of each slot (MASKED: an index into the
            ``L * capacity`` rows), -1 if there is none; a repeated expert repeats its row. ROWS: ``[0, K]``.
        expert_counts: ``[L]`` int32: rows of each local expert, without padding.
    """

    group_key: str
    options: DispatchOptions
    num_tokens: int
    num_received: int | None
    num_delivered: int
    dst_token: Tensor
    dst_counts: Tensor
    src_token: Tensor
    src_counts: Tensor
    topk_idx: Tensor
    row_idx: Tensor
    expert_counts: Tensor
    # CUDA: [T, C] int32: positions of this rank's rows on the other ranks; with several nodes one column of all that is
    # known about them (backends/cuda/across/relay.py). CPU: [0, 0]; with several nodes [rows that
    # this rank passed on, 1 + ranks a node] int32: the node of each, then 1 for each rank of this node that got it.
    _places: Tensor = field(repr=False)
    # CUDA: `Dispatched.host_counts` of the first dispatch, so that redispatch does not wait for the device.
    _host_counts: tuple[int, ...] | None = field(default=None, repr=False)
    # CUDA, several nodes: the first numbers of `_places`, so that the host need not read them there.
    _host_sizes: tuple[int, ...] | None = field(default=None, repr=False)
    # CPU: the number of the dispatch, which ranks compare; 0: not known, in compiled functions.
    _call_number: int = field(default=0, repr=False)

    def _managed_by_torch(self) -> tuple[Tensor, ...]:
        """Return the tensors in memory that torch manages, and reuses in the order of the streams that it knows of."""
        return _tensors_of(self)

    @property
    def src_rank(self) -> Tensor:
        """Source rank of each row received: ``[src_counts.sum()]`` int64."""
        ranks = torch.arange(self.src_counts.numel(), device=self.src_counts.device, dtype=torch.int64)
        # With a known size nothing has to be read back from the device.
        return torch.repeat_interleave(ranks, self.src_counts, output_size=self.num_received)


@dataclass(frozen=True, slots=True, eq=False)
class Dispatched(Generic[Rows_co]):
    """The result of `dispatch` and `redispatch`: ``Dispatched[Tensor]`` or ``Dispatched[Quantized]``, after its rows.

    ``topk_idx``, ``expert_counts`` and ``expert_offsets`` are shared with the plan, and must not be changed in place
    while it is in use: later calls along it would go wrong silently. ``x`` and ``topk_weights`` may be overwritten.

    Attributes:
        x: The rows, a Tensor or a `Quantized` like the input, of its dtypes: ROWS: ``[N, H]``; EXPERTS: ``[rows, H]``;
            MASKED: ``[L, capacity, H]``. Of a `Quantized` both parts have this shape, with W and S for H.
        topk_idx: ROWS: ``[N, K]`` local expert ids, -1 where the expert is not on this rank; otherwise None.
        topk_weights: ROWS: ``[N, K]`` float32, 0 where the expert is not on this rank. EXPERTS: ``[rows]``, MASKED:
            ``[L, capacity]``: one weight per row, undefined in padding unless zeroed. None if none were sent.
        expert_counts: ``[L]`` int32: rows of each local expert, without padding.
        expert_offsets: EXPERTS: ``[L + 1]`` int32: first row of each expert, aligned, then the end. Otherwise None.
        host_counts: ``expert_counts`` as Python ints, or None with ``counts="device"``.
        plan: The plan to pass to `combine` and `redispatch`.
    """

    x: Rows_co
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    expert_counts: Tensor
    expert_offsets: Tensor | None
    host_counts: tuple[int, ...] | None
    plan: Plan


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """The result of `combine`.

    Attributes:
        x: ``[T, H]``, the dtype of the rows: the sum over all rows of each token, plus the biases.
        topk_weights: ``[T, K]`` float32: the weight of each slot, back on its token's rank; None if none were given.
    """

    x: Tensor
    topk_weights: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class DecodeStats:
    """Counters owned by the caller, on the device of the group, to which decode calls add (CUDA: in stream order).

    Args:
        received: ``[L]`` int32 or None: rows that each local expert received (`decode_dispatch` only).
        wait_ns: ``[R]`` int64 or None: nanoseconds that calls waited for each source rank. Across nodes a combine
            counts the time for the sum of another node for each of its ranks.
    """

    received: Tensor | None = None
    wait_ns: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class DecodePlan:
    """A record of where one `decode_dispatch` sent its rows; reusable for any number of `decode_combine` calls.

    With a hook, ``src_token``, ``src_range`` and ``row_weights`` are undefined until the hook has been called.

    Attributes:
        group_key: Key of the group that made the plan.
        num_tokens: T of this rank.
        num_experts: Number of experts, E.
        topk_idx: ``[T, K]``: this rank's own routing, with -1 for experts of masked ranks. If possible, this is the
            tensor that was passed in: leave it unchanged until the last combine has been received.
        topk_weights: ``[T, K]`` float32: this rank's own weights, or None if the routing had none. Leave it unchanged
            too.
        src_token: ``[L, R*M]`` int32: source token of each row; meaningful only below the count.
        src_range: ``[L, R]`` int64: rows of expert e from rank r: ``start << 32 | count``.
        row_weights: ``[L, R*M]`` float32: gate weight of each row, for ``numerics="fast"``; None if none were sent.
    """

    group_key: str
    num_tokens: int
    num_experts: int
    topk_idx: Tensor
    topk_weights: Tensor | None
    src_token: Tensor
    src_range: Tensor
    row_weights: Tensor | None
    # CUDA: [16 + R*M*K] int32: which rows arrived from which rank, and their positions; across nodes more, see
    # tokenferry.backends.cuda.across.decode_forms.RailSizes. CPU, two levels: [N, M, K] int64: by source node, the
    # experts on this node of the tokens that this rank passed on or had itself; -1: none.
    _table: Tensor | None = field(default=None, repr=False)
    # CPU: number of the call, by which a combine detects that another rank uses the plan of a different call.
    _call_number: int = field(default=0, repr=False)

    def _routed(self, topk_idx: Tensor, topk_weights: Tensor) -> DecodePlan:
        """Return the same plan with other tensors of the routing."""
        return replace(self, topk_idx=topk_idx, topk_weights=topk_weights)

    def _managed_by_torch(self) -> tuple[Tensor, ...]:
        """See `Plan._managed_by_torch`."""
        return _tensors_of(self)


@dataclass(frozen=True, slots=True, eq=False)
class DecodeDispatched(Generic[Rows_co]):
    """The result of `decode_dispatch`; its type parameter is Tensor, or with ``quantize`` `Quantized`, as for ``x``.

    With ``return_hook=True`` its tensors are undefined until ``hook()`` has returned (CUDA: until the work that the
    hook enqueued on the current stream is done).

    Attributes:
        x: ``[L, R*M, H]``: the rows of expert e are ``[e, :expert_counts[e]]``, by source rank, then source token;
            a Tensor of the dtype of the rows sent, or with ``quantize`` a `Quantized`: ``data`` float8_e4m3fn, and
            ``scale`` ``[L, R*M, S]`` with unit stride along the rows (column-major, as grouped FP8 GEMMs read it), of
            the dtype and the S that `Scale` gives.
        expert_counts: ``[L]`` int32: rows of each local expert.
        plan: The plan to pass to `decode_combine`.
        hook: With ``return_hook=True``, a function that receives the rows; otherwise it does nothing. It may be called
            on any stream; further calls have no effect. If it is never called, a later call receives the rows, or they
            are dropped. Late or never, it takes no memory beyond that of its own rows. On CPUs a rank sends at most 32
            messages ahead of a peer; the next call then waits for that peer.
    """

    x: Rows_co
    expert_counts: Tensor
    plan: DecodePlan
    hook: Callable[[], None]


@dataclass(frozen=True, slots=True, eq=False)
class DecodeCombined:
    """The result of `decode_combine`. With ``return_hook=True`` ``x`` is undefined until ``hook()`` has returned.

    Attributes:
        x: ``[T, H]``, the dtype of the rows of ``y``: the weighted sums; zeros for a token without experts.
        hook: With ``return_hook=True``, a function that receives the sums; otherwise as for `DecodeDispatched`.
    """

    x: Tensor
    hook: Callable[[], None]


def _tensors_of(plan: Plan | DecodePlan) -> tuple[Tensor, ...]:
    values = (getattr(plan, part.name) for part in fields(plan))
    return tuple(value for value in values if isinstance(value, Tensor))
