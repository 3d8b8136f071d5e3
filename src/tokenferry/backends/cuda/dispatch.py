"""Dispatch and redispatch of the CUDA backend: blocks for received rows, and the kernels that send and arrange rows.

With the form of a call at hand (see `tokenferry.backends.cuda.forms`), a dispatch takes two blocks of the heap, and
launches.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenferry.backends.base import DispatchRequest, RedispatchRequest
from tokenferry.backends.cuda import plan as cuda_plan
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.buffers import SymmetricAllocator, aligned
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.forms import (
    DispatchForm,
    RecvOffsets,
    RedispatchForm,
    SendBuffers,
    expand,
    fuse,
    guessed_form,
    move,
    new_dispatch_form,
    new_redispatch_form,
    row_kind,
)
from tokenferry.backends.cuda.guess import RowGuess
from tokenferry.backends.cuda.launch import WIDEST_SCALE, RowKind, address
from tokenferry.backends.cuda.plan import Counts
from tokenferry.backends.cuda.results import LazyDispatched, LazyPlan, PlanAddresses, PlanLayout, addresses_of
from tokenferry.errors import ArgumentError, TokenferryError
from tokenferry.kernels.codes import EXPERTS, MASKED
from tokenferry.kernels.control_block import OFFSET_BYTES
from tokenferry.kernels.dispatch_fused.spec import num_blocks as blocks_of_fused
from tokenferry.kernels.dispatch_notify.spec import num_units
from tokenferry.types import Dispatched, DispatchOptions, Layout, MoeShape, Plan, Quantized

_MAX_FORMS = 256


class Dispatcher:
    """Dispatch and redispatch calls of one rank.

    Args:
        context: Context of this rank.
        allocator: Allocator of blocks of the heap.
        key: Key of the group, which its plans carry.
    """

    def __init__(self, context: Context, allocator: SymmetricAllocator, key: str) -> None:
        self._context = context
        self._allocator = allocator
        self._key = key
        self._forms: BoundedDict[tuple[Any, ...], DispatchForm] = BoundedDict(_MAX_FORMS)
        self._redispatch_forms: BoundedDict[tuple[Any, ...], RedispatchForm] = BoundedDict(_MAX_FORMS)
        # By signature, and only calls that are complete change it: it is the same on all ranks, which forms are not.
        self._guesses: BoundedDict[bytes, RowGuess] = BoundedDict(_MAX_FORMS)

    # ------------------------------------------------------------------ dispatch

    def dispatch(self, request: DispatchRequest) -> Dispatched[Tensor | Quantized]:
        """Make a plan and send rows along it."""
        index, weights = request.routing.topk_idx, request.routing.topk_weights
        rows, scale = payload_of(request.x)
        kind = row_kind(rows, scale, weighted=weights is not None, topk_idx=index, top_k=index.shape[1])
        form = self.sized(self.form(request.shape, request.options, kind, request.num_sms))
        call = self._context.begin(form.signature)
        if form.waits and call.capturing:
            raise ArgumentError(
                'dispatch: options: counts="host" waits for the device, which a CUDA graph cannot capture; '
                'use DispatchOptions(counts="device")'
            )
        payload = SendBuffers(rows.data_ptr(), scale, address(weights), index.data_ptr())
        return self.send(form, call, payload, index.shape[0])

    def form(self, shape: MoeShape, options: DispatchOptions, kind: RowKind, num_sms: int | None) -> DispatchForm:
        """Return the form of a dispatch.

        Raises:
            ConfigError, CapacityError: as `tokenferry.backends.cuda.plan.geometry`.
        """
        key = (shape, options, kind, num_sms)
        found = self._forms.get(key)
        if found is None:
            found = self._forms[key] = new_dispatch_form(self._context, self._key, shape, options, kind, num_sms)
            if found.geometry.bounded:
                self._allocator.expect(found.worst.num_bytes)
        return found

    def sized(self, form: DispatchForm) -> DispatchForm:
        """Return the form with space for the rows that are expected, if M does not say how many; else the same form.

        The first call of a kind expects nothing.
        """
        if form.guessed is None:
            return form
        guess = self._guesses.get(form.signature.words)
        if guess is None:
            return form
        found = form.guessed.get(guess.num_rows)
        if found is None:
            found = form.guessed[guess.num_rows] = guessed_form(self._context, form, guess.num_rows)
            self._allocator.expect(found.worst.num_bytes)
        return found

    def send(self, form: DispatchForm, call: Call, payload: SendBuffers, num_tokens: int) -> Dispatched[Any]:
        """Make a plan and send rows along it; the rows bring the peers' half of the plan, too.

        If the heap has space for as many rows as there can be, or as many as are expected, rows are sent at once, and
        the host waits for the counts meanwhile. Otherwise it waits for the counts first, and takes blocks of the size
        that they need.

        Args:
            form: The form of the call, as `sized` returns it.
            call: The call.
            payload: What it sends.
            num_tokens: T.

        Raises:
            CapacityError: the heap has no room for the blocks whose sizes are known before the counts.
        """
        allocator = self._allocator
        layout = form.layouts.get(num_tokens) or self._layout(form, num_tokens)
        plan_bytes = layout.num_bytes + form.worst_arrivals.num_bytes
        plan = object.__new__(LazyPlan)
        plan._form, plan._layout, plan._num_sent, plan._made = form.plan, layout, layout.num_sent, {}
        # Blocks are taken before anything is sent: if the heap is full, the group is still whole.
        if form.waits and not allocator.has_room_for_two(plan_bytes + form.worst.num_bytes):
            plan._block = allocator.call_block(call, layout.num_bytes)
            if form.geometry.layout == MASKED:  # its rows do not depend on the counts
                allocator.require(call, form.worst.num_bytes)
            result = self._send_counted(form, call, plan, payload)
        else:
            plan._block = allocator.call_block(call, plan_bytes)
            result = self._send_at_once(form, call, plan, payload)
        if result is None:
            result = self._send_once_more(form, plan, payload)
        if result.leaves_block:
            with self._context.breaking_off():  # the rows are sent, and lost if there is no memory for the copy
                result.leave_block()
        return result

    def _send_at_once(
        self, form: DispatchForm, call: Call, plan: LazyPlan, payload: SendBuffers
    ) -> LazyDispatched | None:
        """Send rows before the host knows how many; None: there are more than was guessed, and none was sent."""
        context = self._context
        result = self._recv(form, call, plan, None)
        counts, num_blocks = None, blocks_of_fused(plan._layout.num_tokens, form.sms.links)
        tight = form.geometry.space.tight and not call.capturing
        if not num_blocks:
            self._launch_plan(form, call, plan, payload.topk_idx)
            if tight:
                counts = self._wait(form, call)
        try:  # from here on, peers wait for the rows of this rank
            self._launch_move(form, call, plan, result, payload, num_blocks)
        except BaseException as error:  # an interrupt, too
            context.break_off(error)
            raise
        if form.unlimited or (tight and counts is None):
            counts = self._wait(form, call)
            if counts is None:
                return None
        if form.waits:
            self._count(form, plan, result, counts or cuda_plan.wait(context, call, form.geometry))
        return result

    def _send_counted(
        self, form: DispatchForm, call: Call, plan: LazyPlan, payload: SendBuffers
    ) -> LazyDispatched | None:
        """Send rows once the host knows how many; None: there are more than was guessed, and none was sent."""
        self._launch_plan(form, call, plan, payload.topk_idx)
        counts = self._wait(form, call)
        if counts is None:
            return None
        with self._context.breaking_off():  # peers wait for the rows of this rank
            result = self._recv(form, call, plan, counts)
            self._launch_move(form, call, plan, result, payload, 0)
        self._count(form, plan, result, counts)
        return result

    def _send_once_more(self, form: DispatchForm, plan: LazyPlan, payload: SendBuffers) -> LazyDispatched:
        """Make a call again, with the same block for its plan, in which more rows came than were guessed."""
        context, unlimited = self._context, form.unlimited
        assert unlimited is not None
        with context.breaking_off(TokenferryError):  # peers, which make it again as well, wait for this rank
            plan._block.trim(plan._layout.num_bytes)
            result = self._send_counted(unlimited, context.begin(unlimited.signature), plan, payload)
        assert result is not None
        return result

    def _wait(self, form: DispatchForm, call: Call) -> Counts | None:
        """Wait for counts on which it depends what this rank does next, and peers wait for that.

        Returns:
            Counts | None: None if there are more rows than was guessed, on any rank.
        """
        context, unlimited = self._context, form.unlimited or form
        with context.breaking_off(TokenferryError):  # waiting itself breaks the group if it has to
            if form.unlimited is None:
                counts = cuda_plan.wait(context, call, form.geometry)
            elif context.wait_for_counts(call, may_overflow=True):
                counts = cuda_plan.counted(context, form.geometry)
            else:
                return None
            if unlimited.guessed is not None:
                words = unlimited.signature.words
                guess = self._guesses.get(words)
                if guess is None:
                    guess = self._guesses[words] = RowGuess()
                guess.note(context.pinned.most_received)
            return counts

    def _layout(self, form: DispatchForm, num_tokens: int) -> PlanLayout:
        made = cuda_plan.plan_layout(form.geometry, self._context.num_ranks, num_tokens, form.kind.top_k)
        form.layouts[num_tokens] = made
        return made

    def _recv(self, form: DispatchForm, call: Call, plan: LazyPlan, counts: Counts | None) -> LazyDispatched:
        """Take the memory for what a dispatch receives: for the worst case, or for counts that are known.

        Raises:
            CapacityError: the heap is full.
        """
        geometry = form.geometry
        result = object.__new__(LazyDispatched)
        result.plan, result._device, result._made = plan, self._context.device, {}
        if counts is None:
            plan._arrivals, plan._recv_block, plan._recv_at = (
                form.worst_arrivals,
                plan._block,
                plan._block.address + plan._layout.num_bytes,
            )
            layout = form.worst
            plan._num_rows, plan.num_delivered = geometry.space.received, geometry.most_delivered
            plan.num_received = plan._counted = None
        else:
            kind = form.kind
            assert kind.topk_dtype is not None
            plan._arrivals = cuda_plan.arrivals(geometry, counts.received, kind.top_k, kind.topk_dtype)
            plan._recv_block = self._allocator.call_block(call, plan._arrivals.num_bytes)
            plan._recv_at = plan._recv_block.address
            layout = cuda_plan.row_layout(geometry.options.layout, kind, counts.delivered)
            plan.num_delivered = counts.delivered
            if not geometry.bounded:
                self._allocator.expect_more(layout.num_bytes)
        result._layout = layout
        result._block, result.leaves_block = self._allocator.recv_block(call, layout.num_bytes)
        return result

    def _launch_plan(self, form: DispatchForm, call: Call, plan: LazyPlan, index: int) -> None:
        """Launch the kernels that make a plan."""
        layout, start = plan._layout, plan._block.address
        T, E = layout.num_tokens, form.geometry.layout == EXPERTS
        table, bases, dst_counts = start + layout.table, start + layout.bases, start + layout.dst_counts
        alive, number, words, stream = call.alive, call.number, call.signature.words, call.stream
        units, sms = num_units(T), form.sms.links
        notify = form.notify
        notify.pack(
            alive, number, words,
            index, table, bases, dst_counts, start + layout.src_counts, start + layout.expert_counts,
            start + layout.expert_offsets if E else 0, 0, T,
        )  # fmt: skip
        notify.launch(max(1, min(units, sms)), stream)
        if T:
            assign = form.assign
            assign.pack(
                alive, number, words,
                index, table, bases, dst_counts, start + layout.places, start + layout.dst_token, T,
            )  # fmt: skip
            assign.launch(min(units, sms), stream)

    def _launch_move(
        self,
        form: DispatchForm,
        call: Call,
        plan: LazyPlan,
        result: LazyDispatched,
        payload: SendBuffers,
        num_fused_blocks: int,
    ) -> None:
        """Launch the kernels that send rows and lay them out; `dispatch_fused`, given blocks, makes the plan, too."""
        block, layout, arrivals = result._block, result._layout, plan._arrivals
        assert block is not None
        at, came = block.offset, plan._recv_at - self._context.window.base
        recv = RecvOffsets(
            (at + layout.rows) // OFFSET_BYTES,
            (at + layout.scale) // OFFSET_BYTES,
            (at + layout.weights) // OFFSET_BYTES,
            (came + arrivals.topk_idx) // OFFSET_BYTES,
            (came + arrivals.src_token) // OFFSET_BYTES,
            (came + arrivals.row_idx) // OFFSET_BYTES,
        )
        if num_fused_blocks:
            fuse(form.fused, call, num_fused_blocks, recv, payload, plan)
            if form.expand is None:
                return
        addresses = plan._addresses()
        if not num_fused_blocks:
            move(form.move, call, form.sms.links, recv, payload, addresses)
        if form.expand is not None:
            ends_with_last_row = form.waits and form.geometry.layout != MASKED
            num_delivered = 0 if ends_with_last_row else plan.num_delivered
            expand(form.expand, call, form.sms.local, block, layout, addresses, num_delivered)

    def _count(self, form: DispatchForm, plan: LazyPlan, result: LazyDispatched, counts: Counts) -> None:
        """Fill in the counts of a dispatch, and give back the memory that it did not need when others need it."""
        geometry, block = form.geometry, result._block
        assert block is not None
        plan._num_rows = plan.num_received = counts.received
        plan.num_delivered, plan._num_sent, plan._counted = counts.delivered, counts.sent, counts.experts
        arrivals, K = plan._arrivals, form.kind.top_k
        slots = counts.received * K
        end = arrivals.topk_idx + slots * form.plan.topk_dtype.itemsize
        if geometry.by_expert:
            end = arrivals.row_idx + 8 * slots
        recv_block = plan._recv_block
        recv_block.trim(plan._recv_at - recv_block.address + end)
        block.trim(result._layout.rows + counts.delivered * form.kind.row_bytes)

    # ------------------------------------------------------------------ redispatch

    def redispatch(self, request: RedispatchRequest) -> Dispatched[Tensor | Quantized]:
        """Send rows along an existing plan."""
        plan, weights = request.plan, request.topk_weights
        rows, scale = payload_of(request.x)
        addresses = addresses_of(plan)
        kind = row_kind(rows, scale, weighted=weights is not None, topk_idx=None, top_k=addresses.top_k)
        form = self.redispatch_form(request.shape, plan, kind, addresses.num_local, request.num_sms)
        call = self._context.begin(form.signature)
        return self.send_again(form, call, plan, addresses, SendBuffers(rows.data_ptr(), scale, address(weights), 0))

    def redispatch_form(
        self, shape: MoeShape, plan: Plan, kind: RowKind, num_local: int, num_sms: int | None
    ) -> RedispatchForm:
        """Return the form of a redispatch along a plan of L local experts."""
        options = plan.options
        masked = options.layout is Layout.MASKED
        capacity = plan.num_delivered // num_local if masked else 0
        key = (shape, options, kind, num_local, capacity, num_sms)
        found = self._redispatch_forms.get(key)
        if found is None:
            found = self._redispatch_forms[key] = new_redispatch_form(
                self._context, shape, options, kind, num_local, capacity, num_sms
            )
        return found

    def send_again(
        self, form: RedispatchForm, call: Call, plan: Plan, addresses: PlanAddresses, payload: SendBuffers
    ) -> Dispatched[Any]:
        """Send rows along a plan, whose addresses are given, too."""
        D = plan.num_delivered
        result = object.__new__(LazyDispatched)
        result.plan, result._device, result._made = plan, self._context.device, {}
        layout = form.layouts.get(D)
        if layout is None:
            layout = form.layouts[D] = cuda_plan.row_layout(plan.options.layout, form.kind, D)
        result._layout = layout
        block, result.leaves_block = self._allocator.recv_block(call, layout.num_bytes)
        result._block, at = block, block.offset
        recv = RecvOffsets(
            (at + layout.rows) // OFFSET_BYTES,
            (at + layout.scale) // OFFSET_BYTES,
            (at + layout.weights) // OFFSET_BYTES,
        )
        move(form.move, call, form.sms.links, recv, payload, addresses)
        if form.expand is not None:
            expand(form.expand, call, form.sms.local, block, layout, addresses, D)
        if result.leaves_block:
            with self._context.breaking_off():  # the rows are sent, and lost if there is no memory for the copy
                result.leave_block()
        return result


def payload_of(x: Tensor | Quantized) -> tuple[Tensor, Tensor | None]:
    """Return rows and scales that kernels can read: copies where they are not aligned."""
    if not isinstance(x, Quantized):
        return aligned(x), None
    scale = x.scale
    if scale.element_size() > WIDEST_SCALE:  # those are copied in bulk
        scale = aligned(scale.contiguous())
    return aligned(x.data), scale
