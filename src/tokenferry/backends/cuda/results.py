"""Plans and results of dispatches on CUDA, which make their tensors when they are asked for them.

A call needs the addresses of tables, and most programs read a few of the tensors of a result. Making all of them would
take longer than the call itself.

Each of these objects is what its public class says: `dataclasses.replace`, copies and pickles of it are plain objects
of that class, with all tensors made. The backend makes them by `object.__new__`, in a third of the time that it takes
to call a class, and sets their attributes; `_made` is a dictionary, empty at first.

`torch.compile` cannot look into the making of a tensor: it breaks its graph where one is made. A function that is
compiled as one graph takes plain objects, such as `tokenferry.autograd` makes in a trace, or a copy (`copy.copy`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenferry.ambient import members_not_compiled
from tokenferry.backends.cuda.launch import RowKind, address
from tokenferry.memory.heap import Block
from tokenferry.memory.tensor import tensor_at
from tokenferry.types import Dispatched, DispatchOptions, Layout, Plan, Quantized


class PlanAddresses(NamedTuple):
    """What the kernels of a call along a plan need to know of it.

    Attributes:
        places: Address of `Plan._places`.
        dst_counts: Address of `Plan.dst_counts`.
        src_counts: Address of `Plan.src_counts`.
        row_idx: Address of `Plan.row_idx`.
        expert_counts: Address of `Plan.expert_counts`.
        num_tokens: T of the plan.
        num_sent: Length of `Plan.dst_token`.
        num_local: Number of local experts, L.
        top_k: Experts of a token, K.
    """

    places: int
    dst_counts: int
    src_counts: int
    row_idx: int
    expert_counts: int
    num_tokens: int
    num_sent: int
    num_local: int
    top_k: int


def addresses_of(plan: Plan) -> PlanAddresses:
    """Return the addresses of a plan of any kind."""
    if isinstance(plan, LazyPlan):
        return plan._addresses()
    return PlanAddresses(
        plan._places.data_ptr(),
        plan.dst_counts.data_ptr(),
        plan.src_counts.data_ptr(),
        address(plan.row_idx),
        plan.expert_counts.data_ptr(),
        plan.num_tokens,
        plan.dst_token.shape[0],
        plan.expert_counts.shape[0],
        plan.topk_idx.shape[1],
    )


@dataclass(frozen=True, slots=True)
class PlanLayout:
    """Where the parts of a plan lie in memory that it takes from the heap, in bytes from the start.

    The parts from ``src_token`` on, whose sizes depend on the rows that arrive, may lie in a block of their own.

    Attributes:
        num_tokens: T of the plan.
        num_sent: Most rows that are sent.
        columns: Columns of `Plan._places`.
        dst_token: `Plan.dst_token`.
        dst_counts: `Plan.dst_counts`.
        src_counts: `Plan.src_counts`.
        expert_counts: `Plan.expert_counts`.
        expert_offsets: `Dispatched.expert_offsets`.
        places: `Plan._places`.
        table: ``[units, E + R]`` int32, as `dispatch_notify` leaves it.
        bases: ``[2 * R + E]`` int32, likewise.
        num_bytes: Where these parts end.
    """

    num_tokens: int
    num_sent: int
    columns: int
    dst_token: int
    dst_counts: int
    src_counts: int
    expert_counts: int
    expert_offsets: int
    places: int
    table: int
    bases: int
    num_bytes: int


class Arrivals(NamedTuple):
    """Where the parts of a plan lie whose sizes depend on the rows that arrive, in bytes from the start of the first.

    Attributes:
        num_rows: Rows for which there is space.
        src_token: `Plan.src_token`.
        topk_idx: `Plan.topk_idx`.
        row_idx: `Plan.row_idx`, of layouts by expert.
        num_bytes: Where these parts end.
    """

    num_rows: int
    src_token: int
    topk_idx: int
    row_idx: int
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class PlanForm:
    """What all plans of the same options and sizes have in common.

    Attributes:
        group_key: `Plan.group_key`.
        options: `Plan.options`.
        num_ranks: R.
        num_local: L.
        top_k: K.
        topk_dtype: dtype of `Plan.topk_idx`.
        device: Device of the tensors.
    """

    group_key: str
    options: DispatchOptions
    num_ranks: int
    num_local: int
    top_k: int
    topk_dtype: torch.dtype
    device: torch.device


@members_not_compiled
class LazyPlan(Plan):
    """A plan in blocks of the heap."""

    __slots__ = (
        "_arrivals",
        "_block",
        "_counted",
        "_form",
        "_layout",
        "_made",
        "_num_rows",
        "_num_sent",
        "_recv_at",
        "_recv_block",
    )
    __setattr__ = object.__setattr__

    _form: PlanForm
    _layout: PlanLayout
    _arrivals: Arrivals
    _block: Block
    _recv_block: Block
    """The block that `_arrivals` are in; often the same, behind the others."""
    _recv_at: int
    """The address at which they begin."""
    _num_rows: int
    _num_sent: int
    _made: dict[str, Tensor]
    _counted: bytes | tuple[int, ...] | None
    """`_host_counts`, or the words that hold them."""
    # Fields of `Plan` that are filled in with the counts.
    num_received: int | None
    num_delivered: int

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, D102 - see the module
        return Plan(*args, **kwargs)

    def __reduce__(self) -> tuple[type[Plan], tuple[Any, ...]]:
        return Plan, tuple(getattr(self, field.name) for field in fields(Plan))

    def __repr__(self) -> str:
        return repr(self.__reduce__()[0](*self.__reduce__()[1]))

    @property
    def group_key(self) -> str:
        """See `Plan.group_key`."""
        return self._form.group_key

    @property
    def options(self) -> DispatchOptions:
        """See `Plan.options`."""
        return self._form.options

    @property
    def num_tokens(self) -> int:
        """See `Plan.num_tokens`."""
        return self._layout.num_tokens

    @property
    def dst_token(self) -> Tensor:
        """See `Plan.dst_token`."""
        return self._sent("dst_token", (self._num_sent,), torch.int64)

    @property
    def dst_counts(self) -> Tensor:
        """See `Plan.dst_counts`."""
        return self._sent("dst_counts", (self._form.num_ranks,), torch.int64)

    @property
    def src_counts(self) -> Tensor:
        """See `Plan.src_counts`."""
        return self._sent("src_counts", (self._form.num_ranks,), torch.int64)

    @property
    def expert_counts(self) -> Tensor:
        """See `Plan.expert_counts`."""
        return self._sent("expert_counts", (self._form.num_local,), torch.int32)

    @property
    def expert_offsets(self) -> Tensor | None:
        """`Dispatched.expert_offsets` of the first dispatch."""
        if self._form.options.layout is not Layout.EXPERTS:
            return None
        return self._sent("expert_offsets", (self._form.num_local + 1,), torch.int32)

    @property
    def _places(self) -> Tensor:
        return self._sent("places", (self._layout.num_tokens, self._layout.columns), torch.int32)

    @property
    def _host_counts(self) -> tuple[int, ...] | None:
        if isinstance(self._counted, bytes):  # there may be hundreds, and many programs do not ask for them
            self._counted = ints_of(self._counted)
        return self._counted

    @property
    def _host_sizes(self) -> tuple[int, ...] | None:
        return None

    @property
    def _call_number(self) -> int:
        return 0

    @property
    def src_token(self) -> Tensor:
        """See `Plan.src_token`."""
        return self._received("src_token", (self._num_rows,), torch.int64)

    @property
    def topk_idx(self) -> Tensor:
        """See `Plan.topk_idx`."""
        return self._received("topk_idx", (self._num_rows, self._form.top_k), self._form.topk_dtype)

    @property
    def row_idx(self) -> Tensor:
        """See `Plan.row_idx`."""
        num_rows = 0 if self._form.options.layout is Layout.ROWS else self._num_rows
        return self._received("row_idx", (num_rows, self._form.top_k), torch.int64)

    def _managed_by_torch(self) -> tuple[Tensor, ...]:
        """Return none: all lie in the blocks, which the heap gives back after the streams that used them."""
        return ()

    def _addresses(self) -> PlanAddresses:
        layout, start = self._layout, self._block.address
        return PlanAddresses(
            start + layout.places,
            start + layout.dst_counts,
            start + layout.src_counts,
            self._recv_at + self._arrivals.row_idx,
            start + layout.expert_counts,
            layout.num_tokens,
            self._num_sent,
            self._form.num_local,
            self._form.top_k,
        )

    def _sent(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        found = self._made.get(name)
        if found is None:
            at = self._block.address + getattr(self._layout, name)
            found = self._made[name] = _normal_tensor_at(at, shape, dtype, self._form.device, self._block)
        return found

    def _received(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        found = self._made.get(name)
        if found is None:
            at = self._recv_at + getattr(self._arrivals, name)
            found = self._made[name] = _normal_tensor_at(at, shape, dtype, self._form.device, self._recv_block)
        return found


class RowLayout(NamedTuple):
    """Where the parts of received rows lie in a block, in bytes from its start.

    Attributes:
        kind: Types and widths of the rows.
        masked: Whether rows are in the MASKED layout, ``[L, capacity, ...]``.
        weights: The weights.
        scale: The scales.
        rows: The rows.
        num_bytes: Where the parts end.
    """

    kind: RowKind
    masked: bool
    weights: int
    scale: int
    rows: int
    num_bytes: int


@members_not_compiled
class LazyDispatched(Dispatched[Any]):
    """The result of a dispatch or redispatch, in a block of the heap."""

    __slots__ = ("_block", "_device", "_layout", "_made", "leaves_block")
    __setattr__ = object.__setattr__

    _block: Block | None
    _device: torch.device
    _layout: RowLayout
    _made: dict[str, Any]
    leaves_block: bool
    """Whether everything has to be copied out of the block at once."""
    plan: Plan

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, D102 - see the module
        return Dispatched(*args, **kwargs)

    def __reduce__(self) -> tuple[type[Dispatched[Any]], tuple[Any, ...]]:
        return Dispatched, tuple(getattr(self, field.name) for field in fields(Dispatched))

    def __repr__(self) -> str:
        return repr(self.__reduce__()[0](*self.__reduce__()[1]))

    @property
    def x(self) -> Tensor | Quantized:
        """See `Dispatched.x`."""
        found: Tensor | Quantized | None = self._made.get("x")
        if found is None:
            layout = self._layout
            kind = layout.kind
            found = self._tensor(layout.rows, kind.columns, kind.dtype)
            if kind.scale_dtype is not None:
                found = Quantized(found, self._tensor(layout.scale, kind.scale_columns, kind.scale_dtype))
            self._made["x"] = found
        return found

    @property
    def topk_weights(self) -> Tensor | None:
        """See `Dispatched.topk_weights`."""
        kind = self._layout.kind
        if not kind.weighted:
            return None
        found: Tensor | None = self._made.get("topk_weights")
        if found is None:
            by_rows = self.plan.options.layout is Layout.ROWS
            found = self._tensor(self._layout.weights, kind.top_k if by_rows else None, torch.float32)
            self._made["topk_weights"] = found
        return found

    @property
    def topk_idx(self) -> Tensor | None:
        """See `Dispatched.topk_idx`."""
        return self.plan.topk_idx if self.plan.options.layout is Layout.ROWS else None

    @property
    def expert_counts(self) -> Tensor:
        """See `Dispatched.expert_counts`."""
        return self.plan.expert_counts

    @property
    def expert_offsets(self) -> Tensor | None:
        """See `Dispatched.expert_offsets`."""
        plan = self.plan
        if isinstance(plan, LazyPlan):
            return plan.expert_offsets
        if plan.options.layout is not Layout.EXPERTS:
            return None
        found: Tensor | None = self._made.get("expert_offsets")
        if found is None:
            unit = plan.options.alignment
            padded = (plan.expert_counts + unit - 1) // unit * unit
            found = self._made["expert_offsets"] = torch.nn.functional.pad(padded.cumsum(0), (1, 0)).int()
        return found

    @property
    def host_counts(self) -> tuple[int, ...] | None:
        """See `Dispatched.host_counts`."""
        plan = self.plan
        if plan._host_counts is not None or plan.options.counts != "host":
            return plan._host_counts
        found: tuple[int, ...] | None = self._made.get("host_counts")
        if found is None:  # a plan that was made of tensors: only a program that asks for the counts waits for them
            found = self._made["host_counts"] = tuple(plan.expert_counts.tolist())
        return found

    def leave_block(self) -> None:
        """Copy everything out of the block, and give it back."""
        x = self.x
        weights = self.topk_weights
        with torch.inference_mode(False):  # as those that stay in the block
            self._made["x"] = Quantized(x.data.clone(), x.scale.clone()) if isinstance(x, Quantized) else x.clone()
            if weights is not None:
                self._made["topk_weights"] = weights.clone()
        self._block = None

    def _tensor(self, at: int, columns: int | None, dtype: torch.dtype) -> Tensor:
        """Return ``[rows, columns]``, or ``[rows]``, in the shape of the layout."""
        block, num_rows = self._block, self.plan.num_delivered
        assert block is not None
        shape = (num_rows,) if columns is None else (num_rows, columns)
        made = _normal_tensor_at(block.address + at, shape, dtype, self._device, block)
        return shaped(made, self.plan) if self._layout.masked else made


def _normal_tensor_at(
    address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, owner: Block
) -> Tensor:
    """Return `tensor_at`, never an inference tensor: the first reader must not decide what others may do with it."""
    if not torch.is_inference_mode_enabled():
        return tensor_at(address, shape, dtype, device, owner)
    with torch.inference_mode(False):
        return tensor_at(address, shape, dtype, device, owner)


def ints_of(words: bytes) -> tuple[int, ...]:
    """Return words of 32 bits as numbers."""
    return tuple(memoryview(words).cast("I").tolist())


def shaped(tensor: Tensor, plan: Plan) -> Tensor:
    """Return ``[rows, ...]`` in the shape of the plan's layout."""
    if plan.options.layout is not Layout.MASKED:
        return tensor
    num_local = plan._form.num_local if isinstance(plan, LazyPlan) else plan.expert_counts.numel()
    return tensor.view(num_local, plan.num_delivered // num_local, *tensor.shape[1:])
