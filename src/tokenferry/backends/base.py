"""What crosses from `api` to a backend: requests in which everything is checked and resolved."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

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
    """In what format rows travel home in `decode_combine`; named as its callers name it."""

    same = 0
    fp8 = 1
    logfmt10 = 2


@dataclass(frozen=True, slots=True)
class Resolved:
    """The options of a group, each decided.

    Attributes:
        shape: The sizes all ranks agree on.
        backend: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        transport: How CPU ranks reach each other; backend cuda has no use for it.
        timeout_s: Seconds that any wait for a peer may take.
        mask_on_timeout: Decode calls mask a silent rank instead of raising.
        heap_bytes: GPU memory for rows that peers write or read; None: what the backend finds right for the shape.
        cache_folder: Where compiled kernels are kept.
        cpu_only: Why an option of this rank can be honoured by the CPU backend only; empty if none is.
    """

    shape: MoeShape
    backend: str
    transport: str
    timeout_s: float
    mask_on_timeout: bool
    heap_bytes: int | None
    cache_folder: str
    cpu_only: str = ""


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
    """New rows, and perhaps new weights, along an old plan."""

    shape: MoeShape
    x: Tensor | Quantized
    topk_weights: Tensor | None
    plan: Plan
    num_sms: int | None


@dataclass(frozen=True, slots=True, eq=False)
class CombineRequest:
    """Rows to bring home; ``out`` is where the sums go."""

    y: Tensor
    plan: Plan
    topk_weights: Tensor | None
    biases: tuple[Tensor, ...]
    out: Tensor | None
    num_sms: int | None


@dataclass(frozen=True, slots=True, eq=False)
class DecodeDispatchRequest:
    """Rows to put into the masked layout; ``quantize`` says how they are cast, None leaves them."""

    shape: MoeShape
    x: Tensor
    routing: Routing
    quantize: Scale | None
    stats: DecodeStats
    return_hook: bool


@dataclass(frozen=True, slots=True, eq=False)
class DecodeCombineRequest:
    """Expert outputs in the masked layout; ``fast`` sums per rank before it is sent.

    ``encoding``: the format of what travels, own rows included: with another than ``same``, H is a multiple of 128.
    """

    shape: MoeShape
    y: Tensor
    plan: DecodePlan
    fast: bool
    encoding: Encoding
    out: Tensor | None
    stats: DecodeStats
    return_hook: bool


def no_hook() -> None:
    """Do nothing: the hook of a decode call that has received its rows already."""


class Backend(Protocol):
    """One way to carry rows. Calls are collective; a failed one breaks the backend.

    ``broken`` then says by what ("was closed", "is broken by ..."); ``key`` is the same on all ranks and marks plans;
    ``why`` says why this backend and transport were chosen. ``checks_routing``: indices outside [-1, E) are found
    where the rows are, so that the host need not look at them.
    """

    name: str
    transport: str
    why: str
    key: str
    rank: int
    num_ranks: int
    device: torch.device
    checks_routing: bool

    @property
    def broken(self) -> str | None: ...  # noqa: D102
    # What each call does is said once, in tokenferry.api.
    def dispatch(self, request: DispatchRequest) -> Dispatched[Any]: ...  # noqa: D102
    def redispatch(self, request: RedispatchRequest) -> Dispatched[Any]: ...  # noqa: D102
    def combine(self, request: CombineRequest) -> Combined: ...  # noqa: D102
    def decode_dispatch(self, request: DecodeDispatchRequest) -> DecodeDispatched[Any]: ...  # noqa: D102
    def decode_combine(self, request: DecodeCombineRequest) -> DecodeCombined: ...  # noqa: D102
    def warmup(self) -> None: ...  # noqa: D102
    def synchronize(self) -> None: ...  # noqa: D102
    def empty_rows(self, plan: Plan, dtype: torch.dtype, hidden: int) -> Tensor: ...  # noqa: D102
    def plan_columns(self, shape: MoeShape, options: DispatchOptions) -> int:
        """Return the columns of ``Plan._places``, which has T rows, or none where this is 0."""
        ...

    def mask(self, rank: int, *, masked: bool) -> None: ...  # noqa: D102
    def masked(self) -> frozenset[int]: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102
