"""Combine of the CUDA backend: rows are pushed to where they are added up, or fetched from where they lie by expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenferry.backends.base import CombineRequest
from tokenferry.backends.cuda import launch
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.buffers import SymmetricAllocator, aligned
from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate
from tokenferry.backends.cuda.plan import LAYOUT_CODES
from tokenferry.backends.cuda.results import PlanAddresses, addresses_of
from tokenferry.backends.cuda.signature import Signature
from tokenferry.backends.tensors import may_write_to
from tokenferry.formats.dtypes import dtype_code
from tokenferry.kernels.codes import PIECE_BYTES
from tokenferry.kernels.combine_push import spec as push_spec
from tokenferry.kernels.control_block import OFFSET_BYTES
from tokenferry.memory.heap import Block
from tokenferry.tuning import Machine, num_pushers, tune
from tokenferry.types import Combined, Layout, MoeShape, Plan

_MAX_FORMS = 256
_MAX_SPLITS = 1024
"""Numbers of tokens for which a form remembers the division of work."""


@dataclass(frozen=True, slots=True)
class Work:
    """The division of the work of a combine, which depends on T.

    Attributes:
        fetch_sms: SMs of a combine whose rows peers fetch.
        push_sms: SMs of a combine that pushes rows.
        pushers: Those of them that push.
        whole: `combine_push`: what `spec.num_whole` returns.
        unit_bits: `combine_push`: log2 of the rows of a unit.
    """

    fetch_sms: int
    push_sms: int
    pushers: int
    whole: int
    unit_bits: int


@dataclass(frozen=True, slots=True, eq=False)
class CombineForm:
    """What all combines of the same layout, sizes, dtype and ``num_sms`` share.

    Attributes:
        signature: Signature of the calls.
        layout: Layout of the rows.
        dtype: dtype of the rows.
        columns: Elements of a row.
        top_k: Experts of a token, K.
        num_local: Number of local experts, L.
        num_sms: SMs of the kernels; None: as tuned.
        works: The division of work, by T.
        kernel: `combine_push` for ROWS, else `combine_pull`.
    """

    signature: Signature
    layout: Layout
    dtype: torch.dtype
    columns: int
    top_k: int
    num_local: int
    num_sms: int | None
    works: BoundedDict[int, Work]
    kernel: LaunchTemplate


class Sums(NamedTuple):
    """Where sums go, and with what they start.

    Attributes:
        out: Address of the sums, a multiple of 16.
        bias0: Address of what the sums start with; 0: nothing.
        bias1: Address of what is added to that; 0: nothing.
        weights_out: Address of the sums of weights; 0: there are none.
    """

    out: int
    bias0: int = 0
    bias1: int = 0
    weights_out: int = 0


class Source(NamedTuple):
    """What sums are made from.

    Attributes:
        rows: Address of the rows.
        rows_at: Their offset in the window; 0: they lie elsewhere, and are pushed.
        weights_at: Offset of their weights in the window; 0: there are none.
        landing: Offset of the memory that rows are pushed to; 0: none is needed.
        kept: Keeps all of it.
    """

    rows: int
    rows_at: int
    weights_at: int
    landing: int
    kept: tuple[object, ...]


class Combiner:
    """Combine calls of one rank.

    Args:
        context: Context of this rank.
        allocator: Allocator of blocks of the heap.
    """

    def __init__(self, context: Context, allocator: SymmetricAllocator) -> None:
        self._context = context
        self._allocator = allocator
        self._forms: BoundedDict[tuple[Any, ...], CombineForm] = BoundedDict(_MAX_FORMS)
        self._stages: BoundedDict[tuple[int, int, int], LaunchTemplate] = BoundedDict(_MAX_FORMS)

    def combine(self, request: CombineRequest) -> Combined:
        """Add up the rows of each of this rank's tokens."""
        y, plan, weights = request.y, request.plan, request.topk_weights
        plan_at = addresses_of(plan)
        form = self.form(plan, plan_at, y, weighted=weights is not None, num_sms=request.num_sms)
        call = self._context.begin(form.signature)
        done = self.send(form, call, y, plan_at, weights, request.biases, direct_out(request))
        return delivered(request, done)

    def form(
        self, plan: Plan, plan_at: PlanAddresses, y: Tensor, *, weighted: bool, num_sms: int | None
    ) -> CombineForm:
        """Return the form of a combine of rows ``y``."""
        layout, K, columns = plan.options.layout, plan_at.top_k, y.shape[-1]
        key = (layout, y.dtype, columns, weighted, plan_at.num_local, K, num_sms)
        found = self._forms.get(key)
        if found is None:
            signature = Signature(
                "combine",
                layout=LAYOUT_CODES[layout],
                dtype=dtype_code(y.dtype),
                bytes_of_rows=columns * y.element_size(),
                bytes_of_weights=4 if weighted else 0,
            )
            make = launch.push_template if layout is Layout.ROWS else launch.pull_template
            found = self._forms[key] = CombineForm(
                signature,
                layout,
                y.dtype,
                columns,
                K,
                plan_at.num_local,
                num_sms,
                BoundedDict(_MAX_SPLITS),
                make(self._context, y.dtype, columns, K),
            )
        return found

    def send(
        self,
        form: CombineForm,
        call: Call,
        y: Tensor,
        plan_at: PlanAddresses,
        weights: Tensor | None,
        biases: tuple[Tensor, ...],
        out: Tensor | None,
    ) -> Combined:
        """Add up the rows of each of this rank's tokens; ``out``: where to, or None for a new tensor."""
        num_tokens, empty = plan_at.num_tokens, self._context.empty
        if out is None:
            out = empty((num_tokens, form.columns), (form.columns, 1), form.dtype)
        weights_out = None
        if weights is not None:
            weights_out = empty((num_tokens, form.top_k), (form.top_k, 1), torch.float32)
        if biases:
            biases = tuple(map(aligned, biases))
        sums = Sums(
            out.data_ptr(),
            biases[0].data_ptr() if biases else 0,
            biases[1].data_ptr() if len(biases) > 1 else 0,
            0 if weights_out is None else weights_out.data_ptr(),
        )
        source = self.source(form, call, y, weights, plan_at)
        self.add_up(form, call, source, plan_at, sums)
        del source  # its blocks are given back on this stream, after the kernel
        return Combined(out, weights_out)

    def source(
        self,
        form: CombineForm,
        call: Call,
        y: Tensor,
        weights: Tensor | None,
        plan_at: PlanAddresses,
        *,
        shared: bool = False,
    ) -> Source:
        """Return what sums are made from.

        Args:
            form: The form of the combine.
            call: The call.
            y: The rows.
            weights: Their weights.
            plan_at: The plan, as that of one node.
            shared: Whether several sums read the same rows, on all ranks. They are copied into the window if they lie
                elsewhere, so that peers fetch them, and no rank pushes.

        Raises:
            CapacityError: the heap is full.
        """
        allocator, copied, copied_weights, landing, weights_at = self._allocator, None, None, None, 0
        if form.layout is Layout.ROWS and not shared:
            y = aligned(y)
            rows_at = allocator.offset(y)
            landing = allocator.call_block(call, plan_at.num_sent * form.columns * form.dtype.itemsize)
        else:
            rows_at, copied = self._expert_rows_in_window(form, call, y, plan_at)
        if weights is not None:
            weights_at, copied_weights = allocator.in_window(call, weights)
        return Source(
            y.data_ptr() if copied is None else copied.address,
            rows_at,
            weights_at,
            0 if landing is None else landing.offset,
            (y, copied, copied_weights, landing),
        )

    def add_up(self, form: CombineForm, call: Call, source: Source, plan_at: PlanAddresses, sums: Sums) -> None:
        """Launch the kernel that adds up the rows of each of this rank's tokens."""
        num_tokens = plan_at.num_tokens
        work = form.works.get(num_tokens) or self._work(form, num_tokens)
        rows, rows_at, weights_at, landing, _ = source
        counts = (plan_at.src_counts, plan_at.dst_counts, num_tokens)
        if form.layout is not Layout.ROWS:  # rows by expert, which lie in the window
            first_column = 2 * self._context.num_ranks + form.top_k  # of the columns for `combine_pull`
            form.kernel.pack(
                call.alive, call.number, call.signature.words, rows_at // OFFSET_BYTES, weights_at // OFFSET_BYTES,
                plan_at.places + 4 * first_column, plan_at.places, *sums, *counts,
            )  # fmt: skip
            form.kernel.launch(work.fetch_sms, call.stream)
            return
        # Rows are pushed, or fetched by peers if they lie in the window.
        pushers, whole, sms = (0, 0, work.fetch_sms) if rows_at else (work.pushers, work.whole, work.push_sms)
        form.kernel.pack(
            call.alive, call.number, call.signature.words,
            landing // OFFSET_BYTES, weights_at // OFFSET_BYTES, 0, work.unit_bits, rows_at // OFFSET_BYTES,
            plan_at.places, plan_at.places, *sums, *counts, rows, pushers, whole,
        )  # fmt: skip
        form.kernel.launch(sms, call.stream)

    def _work(self, form: CombineForm, num_tokens: int) -> Work:
        num_ranks, columns = self._context.num_ranks, form.columns
        shape = MoeShape(form.num_local * num_ranks, form.top_k, columns, max(num_tokens, 1))
        tuning = tune(shape, Machine(num_ranks, self._context.num_sms))
        push_sms = form.num_sms or tuning.push_sms
        pushers = 0 if num_ranks == 1 else num_pushers(push_sms)
        pieces = -(-columns * form.dtype.itemsize // PIECE_BYTES)
        warps = push_spec.num_warps(self._context.dynamic_bytes(push_spec.SPEC))
        made = form.works[num_tokens] = Work(
            form.num_sms or tuning.combine_sms,
            push_sms,
            pushers,
            push_spec.num_whole(num_tokens, pieces, warps * max(1, push_sms - pushers)),
            push_spec.unit_bits(num_tokens),
        )
        return made

    def _expert_rows_in_window(
        self, form: CombineForm, call: Call, y: Tensor, plan_at: PlanAddresses
    ) -> tuple[int, Block | None]:
        """Return the offset of rows in the window, or of a copy in a block, which is returned, too.

        Of a masked layout only the rows below the counts are copied.

        Raises:
            CapacityError: the heap is full.
        """
        allocator = self._allocator
        if form.layout is not Layout.MASKED or allocator.offset(y):
            return allocator.in_window(call, y)
        block = allocator.call_block(call, y.numel() * y.element_size())
        y = aligned(y)
        if y.numel():
            num_local, capacity, columns = y.shape
            key = (num_local, capacity, columns * y.element_size())
            stage = self._stages.get(key)
            if stage is None:
                stage = self._stages[key] = launch.stage_template(self._context, *key)
            stage.pack(
                call.alive, call.number, call.signature.words,
                y.data_ptr(), block.address, plan_at.expert_counts, plan_at.src_counts,
            )  # fmt: skip
            stage.launch(form.num_sms or self._context.num_sms, call.stream)
        return block.offset, block


def direct_out(request: CombineRequest) -> Tensor | None:
    """Return ``out`` of a request if kernels can write it: aligned, and apart from what they read. Pure."""
    out = request.out
    if out is None or out.data_ptr() % 16 or not may_write_to(out, request.y, request.biases):
        return None
    return out


def delivered(request: CombineRequest, done: Combined) -> Combined:
    """Return the sums in ``out`` of a request, if it has one: copied, where kernels have written elsewhere."""
    if request.out is None or done.x is request.out:
        return done
    with torch.inference_mode():  # `out` may come from it
        request.out.copy_(done.x)
    return Combined(request.out, done.topk_weights)
