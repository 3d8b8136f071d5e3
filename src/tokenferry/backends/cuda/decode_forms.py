"""Forms of decode calls: what follows from sizes, options and dtypes, worked out once; and plans in one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenferry.ambient import members_not_compiled
from tokenferry.backends.base import Encoding
from tokenferry.backends.cuda.buffers import section_ends
from tokenferry.backends.cuda.channel import PendingRecv
from tokenferry.backends.cuda.context import Context, LaunchTemplate, call_packer
from tokenferry.backends.cuda.signature import Signature
from tokenferry.backends.cuda.workspace import Workspace
from tokenferry.formats.dtypes import dtype_code
from tokenferry.kernels.codes import RAW, TYPES
from tokenferry.kernels.decode_combine import spec as decode_combine_spec
from tokenferry.kernels.decode_dispatch import spec as decode_dispatch_spec
from tokenferry.kernels.decode_words import PLACES_WORD, SCALE_FLOAT32, SCALE_POWER_OF_TWO, SCALE_UE8M0
from tokenferry.memory.empty import Blank, contiguous, part_of
from tokenferry.types import DecodeDispatched, DecodePlan, MoeShape, Quantized, Scale

DISPATCH_FIELDS = (
    "x", "topk_idx", "weights", "choices", "out", "scale_out", "expert_counts", "received", "src_token", "src_range",
    "row_weights", "table", "masked_out", "trace", "num_tokens", "phases",
)  # fmt: skip
_DISPATCH = call_packer(decode_dispatch_spec.SPEC, *DISPATCH_FIELDS, waits=True)
_COMBINE = call_packer(
    decode_combine_spec.SPEC,
    "y", "out", "topk_idx", "weights", "row_weights", "table", "pending", "masked_out", "trace", "num_tokens", "phases",
    waits=True,
)  # fmt: skip
SCALE_CODES = {None: 0, Scale.FLOAT32: SCALE_FLOAT32, Scale.POWER_OF_TWO: SCALE_POWER_OF_TWO, Scale.UE8M0: SCALE_UE8M0}


class DispatchKind(NamedTuple):
    """What a form of decode dispatches follows from.

    Attributes:
        shape: Sizes.
        dtype: dtype of the rows.
        quantize: Format of the scales of rows cast to FP8; None: rows are not cast.
        topk_dtype: dtype of ``topk_idx``.
        weighted: Whether weights are sent.
    """

    shape: MoeShape
    dtype: torch.dtype
    quantize: Scale | None
    topk_dtype: torch.dtype
    weighted: bool

    def signature(self) -> Signature:
        """Return the signature of the calls."""
        shape = self.shape
        return Signature(
            "decode_dispatch",
            num_experts=shape.num_experts,
            max_tokens=shape.max_tokens,
            dtype=dtype_code(self.dtype),
            fp8_scale=SCALE_CODES[self.quantize],
            bytes_of_rows=shape.hidden * self.dtype.itemsize,
            bytes_of_weights=4 * shape.top_k if self.weighted else 0,
            bytes_of_topk_idx=shape.top_k * self.topk_dtype.itemsize,
        )


class CombineKind(NamedTuple):
    """What a form of decode combines follows from.

    Attributes:
        shape: Sizes.
        dtype: dtype of the rows.
        fast: Whether a rank adds up its rows of a token before it sends them.
        encoding: Format of rows on the way.
        topk_dtype: dtype of `DecodePlan.topk_idx`.
    """

    shape: MoeShape
    dtype: torch.dtype
    fast: bool
    encoding: Encoding
    topk_dtype: torch.dtype

    def signature(self) -> Signature:
        """Return the signature of the calls."""
        return Signature(
            "decode_combine",
            fast=int(self.fast),
            encoding=int(self.encoding),
            dtype=dtype_code(self.dtype),
            bytes_of_rows=self.shape.hidden * self.dtype.itemsize,
        )


@dataclass(frozen=True, slots=True)
class DecodeLayout:
    """Where the parts of a decode plan lie in one tensor, in words of 32 bits.

    Attributes:
        src_range: `DecodePlan.src_range`.
        expert_counts: `DecodeDispatched.expert_counts`.
        src_token: `DecodePlan.src_token`.
        row_weights: `DecodePlan.row_weights`.
        table: `DecodePlan._table`.
        table_words: Its size.
        num_words: Where the parts end.
    """

    src_range: int
    expert_counts: int
    src_token: int
    row_weights: int
    table: int
    table_words: int
    num_words: int


@dataclass(frozen=True, slots=True, eq=False)
class DecodeCombineForm:
    """What all decode combines of the same shape, dtypes and options share.

    Attributes:
        signature: Signature of the calls.
        workspace: Number of the workspace for their rows under way. Forms outlive workspaces, and keep none alive.
        members: A bit for each rank with which it was made.
        kernel: The kernel.
    """

    signature: Signature
    workspace: int
    members: int
    kernel: LaunchTemplate


@dataclass(frozen=True, slots=True, eq=False)
class DecodeDispatchForm:
    """What all decode dispatches of the same shape, dtypes and options share.

    Attributes:
        signature: Signature of the calls.
        workspace: Number of the workspace for their rows under way. Forms outlive workspaces, and keep none alive.
        members: A bit for each rank with which it was made.
        kernel: The kernel.
        shape: Sizes of the call.
        num_local: Number of local experts, L.
        capacity: Rows of an expert, R * M.
        num_ranks: R.
        rows: The tensor for the rows that arrive.
        scale: The tensor for their scales; None without them.
        words: The tensor for the parts of a plan.
        weighted: Whether weights are sent.
        layout: Where these parts lie.
        group_key: `DecodePlan.group_key`.
        kept_bytes: Bytes of the largest routing that blocks keep for themselves.
    """

    signature: Signature
    workspace: int
    members: int
    kernel: LaunchTemplate
    shape: MoeShape
    num_local: int
    capacity: int
    num_ranks: int
    rows: Blank
    scale: Blank | None
    words: Blank
    weighted: bool
    layout: DecodeLayout
    group_key: str
    kept_bytes: int


def new_dispatch_form(
    context: Context, group_key: str, signature: Signature, workspace: Workspace, kind: DispatchKind
) -> DecodeDispatchForm:
    """Return the form of decode dispatches with a signature, whose rows under way are in a workspace."""
    shape, R = kind.shape, context.num_ranks
    kernel = context.new_template(decode_dispatch_spec.SPEC, _DISPATCH, type=cast_type(kind), relays=0)
    fill_dispatch(context, kernel, workspace, kind, R)
    kernel.params.max_tokens = shape.max_tokens
    E, M = shape.num_experts, shape.max_tokens
    kept = decode_dispatch_spec.kept_bytes(E, R, M, context.dynamic_bytes(decode_dispatch_spec.SPEC))
    kernel.smem_bytes = decode_dispatch_spec.smem_bytes(M * shape.top_k, kept, E, R, M)
    table_words = PLACES_WORD + R * M * shape.top_k
    return form_of(kernel, group_key, signature, workspace, kind, DispatchSizes(R, table_words, kept))


class DispatchSizes(NamedTuple):
    """What a form of decode dispatches follows from besides their kind: R, words of `DecodePlan._table`, kept bytes."""

    num_ranks: int
    table_words: int
    kept_bytes: int


def form_of(
    kernel: LaunchTemplate,
    group_key: str,
    signature: Signature,
    workspace: Workspace,
    kind: DispatchKind,
    sizes: DispatchSizes,
) -> DecodeDispatchForm:
    """Return the form of decode dispatches whose kernel is ready."""
    shape, quantize, R = kind.shape, kind.quantize, sizes.num_ranks
    L, capacity, H = shape.num_experts // R, R * shape.max_tokens, shape.hidden
    weights_bytes = 4 * L * capacity if kind.weighted else 0
    ends = section_ends(8 * L * R, 4 * L, 4 * L * capacity, weights_bytes, 4 * sizes.table_words)
    counts, src_token, row_weights, table, end = (each // 4 for each in ends)
    layout = DecodeLayout(0, counts, src_token, row_weights, table, sizes.table_words, end)
    return DecodeDispatchForm(
        signature,
        workspace.number,
        workspace.members,
        kernel,
        shape,
        L,
        capacity,
        R,
        contiguous(kind.dtype if quantize is None else torch.float8_e4m3fn, L, capacity, H),
        None if quantize is None else _blank_scale(quantize, L, capacity, H),
        contiguous(torch.int32, layout.num_words),
        kind.weighted,
        layout,
        group_key,
        sizes.kept_bytes,
    )


def _blank_scale(quantize: Scale, num_local: int, capacity: int, hidden: int) -> Blank:
    """Return a tensor for scales with unit stride along the rows of an expert."""
    packed = quantize is Scale.UE8M0
    num_scales = -(-hidden // (512 if packed else 128))
    strides = (num_scales * capacity, 1, capacity)
    return Blank((num_local, capacity, num_scales), strides, torch.int32 if packed else torch.float32)


def cast_type(kind: DispatchKind) -> int:
    """Return the constant ``kType`` of the kernels that cast rows."""
    return RAW if kind.quantize is None else TYPES[kind.dtype]


def fill_dispatch(
    context: Context, kernel: LaunchTemplate, workspace: Workspace, kind: DispatchKind, num_ranks: int
) -> None:
    """Fill in what `decode_dispatch` needs of a kind of calls of R ranks, but for the tokens of each.

    Args:
        context: Context of this rank.
        kernel: The template.
        workspace: Where rows are under way.
        kind: The kind.
        num_ranks: R of the whole group.
    """
    shape, dtype, quantize, topk_dtype, weighted = kind
    p, H, L = kernel.params, shape.hidden, shape.num_experts // num_ranks
    _set_workspace(context, p, workspace)
    p.packets_at, p.packets_stride = workspace.rows_at, workspace.sizes.rows
    p.notes_at, p.notes_stride, p.words_stride = workspace.notes_at, workspace.sizes.notes, workspace.sizes.words
    p.top_k, p.num_local, p.columns, p.capacity = shape.top_k, L, H, num_ranks * shape.max_tokens
    p.row_units = H * (dtype.itemsize if quantize is None else 1) // 16
    p.scale_units = 0 if quantize is None else -(-H // 512)
    p.scale_format, p.per_local = SCALE_CODES[quantize], 1 / L
    p.wide, p.weighted = int(topk_dtype is torch.int64), int(weighted)
    kernel.block = decode_dispatch_spec.THREADS


def new_combine_form(
    context: Context, signature: Signature, workspace: Workspace, kind: CombineKind
) -> DecodeCombineForm:
    """Return the form of decode combines with a signature, whose rows under way are in a workspace."""
    shape, dtype, fast, encoding, topk_dtype = kind
    kernel = context.new_template(
        decode_combine_spec.SPEC, _COMBINE, type=TYPES[dtype], fast=int(fast), encoding=int(encoding)
    )
    p = kernel.params
    _set_workspace(context, p, workspace)
    p.packets_at, p.packets_stride = workspace.answers_at, workspace.sizes.answers
    p.max_tokens, p.top_k, p.columns = shape.max_tokens, shape.top_k, shape.hidden
    p.num_local = shape.num_experts // context.num_ranks
    p.wide = int(topk_dtype is torch.int64)
    kernel.block = decode_combine_spec.THREADS
    return DecodeCombineForm(signature, workspace.number, workspace.members, kernel)


def _set_workspace(context: Context, params: Any, workspace: Workspace) -> None:  # noqa: ANN401 - a params struct
    for rank, start in enumerate(workspace.addresses):
        params.workspaces[rank] = start
    params.mask_late = int(context.mask_late)


@members_not_compiled
class LazyDecodePlan(DecodePlan):
    """A decode plan whose tensors are parts of one, made when they are asked for; see `LazyPlan`."""

    __slots__ = ("_form", "_made", "_pending", "_words")
    __setattr__ = object.__setattr__

    _form: DecodeDispatchForm
    _pending: PendingRecv | None
    """What receives its rows, if a hook does; a combine without them would follow a table that holds anything."""
    _words: Tensor
    """``[num_words]`` int32: all parts of the plan."""
    _made: dict[str, Tensor]
    # Fields of `DecodePlan` that belong to the call.
    num_tokens: int
    topk_idx: Tensor
    topk_weights: Tensor | None
    _call_number: int

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, D102 - see tokenferry.backends.cuda.results
        return DecodePlan(*args, **kwargs)

    def __reduce__(self) -> tuple[type[DecodePlan], tuple[Any, ...]]:
        return DecodePlan, tuple(getattr(self, field.name) for field in fields(DecodePlan))

    def __repr__(self) -> str:
        return repr(self.__reduce__()[0](*self.__reduce__()[1]))

    def _routed(self, topk_idx: Tensor, topk_weights: Tensor) -> DecodePlan:
        other = object.__new__(LazyDecodePlan)
        other._form, other._words, other._made, other._call_number = self._form, self._words, self._made, 0
        other._pending = self._pending
        other.num_tokens, other.topk_idx, other.topk_weights = self.num_tokens, topk_idx, topk_weights
        return other

    def _managed_by_torch(self) -> tuple[Tensor, ...]:
        """Return those of which the others are parts."""
        parts = (self._words, self.topk_idx)
        return parts if self.topk_weights is None else (*parts, self.topk_weights)

    @property
    def group_key(self) -> str:
        """See `DecodePlan.group_key`."""
        return self._form.group_key

    @property
    def num_experts(self) -> int:
        """See `DecodePlan.num_experts`."""
        return self._form.shape.num_experts

    @property
    def src_token(self) -> Tensor:
        """See `DecodePlan.src_token`."""
        return self._part("src_token", (self._form.num_local, self._form.capacity), torch.int32)

    @property
    def src_range(self) -> Tensor:
        """See `DecodePlan.src_range`."""
        return self._part("src_range", (self._form.num_local, self._form.num_ranks), torch.int64)

    @property
    def row_weights(self) -> Tensor | None:
        """See `DecodePlan.row_weights`."""
        form = self._form
        return self._part("row_weights", (form.num_local, form.capacity), torch.float32) if form.weighted else None

    @property
    def expert_counts(self) -> Tensor:
        """`DecodeDispatched.expert_counts` of the dispatch, of which nearly every program asks for this part alone."""
        found = self._made.get("expert_counts")
        if found is None:
            form = self._form
            found = part_of(self._words, form.layout.expert_counts, (form.num_local,), (1,))
            self._made["expert_counts"] = found
        return found

    @property
    def _table(self) -> Tensor:
        return self._part("table", (self._form.layout.table_words,), torch.int32)

    def _part(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        found = self._made.get(name)
        if found is None:
            start = getattr(self._form.layout, name)
            part = self._words.narrow(0, start, math.prod(shape) * dtype.itemsize // 4)
            found = part if dtype is torch.int32 else part.view(dtype)
            found = self._made[name] = found if len(shape) == 1 else found.view(shape)
        return found


@members_not_compiled
class LazyDecodeDispatched(DecodeDispatched[Any]):
    """The result of a decode dispatch along such a plan."""

    __slots__ = ()
    __setattr__ = object.__setattr__

    # Fields of `DecodeDispatched` that belong to the call.
    x: Tensor | Quantized
    plan: LazyDecodePlan
    hook: Callable[[], None]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, D102 - see tokenferry.backends.cuda.results
        return DecodeDispatched(*args, **kwargs)

    def __reduce__(self) -> tuple[type[DecodeDispatched[Any]], tuple[Any, ...]]:
        return DecodeDispatched, tuple(getattr(self, field.name) for field in fields(DecodeDispatched))

    def __repr__(self) -> str:
        return repr(self.__reduce__()[0](*self.__reduce__()[1]))

    @property
    def expert_counts(self) -> Tensor:
        """See `DecodeDispatched.expert_counts`."""
        return self.plan.expert_counts
