"""Decode calls of the CUDA backend: one kernel a call; with a hook one that sends, and one that receives."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.backends.base import DecodeCombineRequest, DecodeDispatchRequest
from tokenferry.backends.cuda.buffers import SymmetricAllocator, aligned, overlap
from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate
from tokenferry.backends.cuda.faults import Signature
from tokenferry.backends.cuda.launch import address
from tokenferry.backends.cuda.plan import too_large
from tokenferry.backends.cuda.workspace import Exchange, Workspace, Workspaces
from tokenferry.backends.masking import drop_ranks
from tokenferry.errors import ArgumentError, ConfigError
from tokenferry.formats.dtypes import dtype_code
from tokenferry.kernels.codes import RAW, TYPES
from tokenferry.kernels.decode_combine import spec as decode_combine_spec
from tokenferry.kernels.decode_dispatch import spec as decode_dispatch_spec
from tokenferry.kernels.decode_words import (
    BAD,
    NONE,
    PLACES_WORD,
    RECEIVE,
    REPEATED,
    SCALE_FLOAT32,
    SCALE_POWER_OF_TWO,
    SCALE_UE8M0,
    SEND,
)
from tokenferry.types import DecodeCombined, DecodeDispatched, DecodePlan, MoeShape, Quantized, Scale

_SPREAD = struct.Struct("<14Q")
_COLLECT = struct.Struct("<9Q")
_SIZES = struct.Struct("<2I")
_MOST_TOKENS = 1 << 16
"""M; with the most experts, places of rows stay far below 2^31."""
_SCALES = {
    None: 0,
    Scale.FLOAT32: SCALE_FLOAT32,
    Scale.POWER_OF_TWO: SCALE_POWER_OF_TWO,
    Scale.UE8M0: SCALE_UE8M0,
}


@dataclass(slots=True, eq=False)
class PendingRecv:
    """The second half of a call that has been sent.

    Attributes:
        call: The call.
        launch: Enqueues what receives.
        tensors: What that writes.
        done: Whether it has been enqueued.
    """

    call: Call
    launch: Callable[[Call], None]
    tensors: tuple[Tensor | None, ...]
    done: bool = False


class Channel:
    """The sends of one direction whose receipt may still be owed: of the last two.

    A send writes to the half of the peers' memory of the send two before it. So that one is received first, here as on
    every rank: where its hook has not been called, it is as if it was called now.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._last: deque[PendingRecv | None] = deque(maxlen=2)

    def make_room(self, call: Call) -> None:
        """Receive what the next send will overwrite.

        Raises:
            ArgumentError: a CUDA graph is captured, and the receipt belongs to a call outside of it.
        """
        if len(self._last) < 2 or self._last[0] is None or self._last[0].done:
            return
        owed = self._last[0]
        if call.capturing and not owed.call.capturing:
            raise ArgumentError(
                f"{call.signature.phase}: the hook of an earlier {owed.call.signature.phase} has to be called before a "
                "CUDA graph is captured"
            )
        if call.capturing == owed.call.capturing:  # a hook that a capture forgot stays forgotten
            self.receive(owed)

    def sent(self, pending: PendingRecv | None) -> None:
        """Note a send; None: it was received by the same kernel."""
        self._last.append(pending)

    def receive_open(self) -> None:
        """Enqueue what is owed, but for what a capture forgot."""
        for pending in tuple(self._last):
            if pending is not None and not pending.done and not pending.call.capturing:
                self.receive(pending)

    def forget(self) -> None:
        """Owe nothing any more: hooks that have not been called do nothing."""
        for pending in self._last:
            if pending is not None:
                pending.done, pending.tensors = True, ()
        self._last.clear()

    def receive(self, pending: PendingRecv) -> None:
        """Enqueue the second half of a call, once.

        Raises:
            ArgumentError: it was sent inside of a capture and is received outside of it, or the other way round.
        """
        if pending.done:
            self._context.order_after_calls()  # a later call has received it, perhaps on another stream
            return
        before = pending.call
        call = self._context.resume(before)
        if call.capturing != before.capturing:
            raise ArgumentError(
                f"{before.signature.phase}: hook: a CUDA graph has to capture both the call and its hook, or neither"
            )
        if call.stream != before.stream and not call.capturing and self._context.device.type == "cuda":
            stream = torch.cuda.current_stream(self._context.device)
            for tensor in pending.tensors:
                if tensor is not None:
                    tensor.record_stream(stream)
        pending.launch(call)
        pending.done, pending.tensors = True, ()


class Decoder:
    """Decode calls of one rank.

    Args:
        context: This rank's.
        allocator: Where blocks come from.
        key: Of the group, for plans.
        exchange: Collective; makes workspaces.

    Attributes:
        trace: ``[blocks, TRACE_WORDS]`` int64 zeros, to which calls write when what happened; None: they do not.
    """

    def __init__(self, context: Context, allocator: SymmetricAllocator, key: str, exchange: Exchange) -> None:
        self._context = context
        self._key = key
        self.workspaces = Workspaces(context, allocator, exchange)
        self._channels = (Channel(context), Channel(context))
        self._signatures: dict[tuple[object, ...], Signature] = {}
        self.trace: Tensor | None = None

    def forget(self) -> None:
        """As if nothing were under way: receipts and workspaces."""
        for channel in self._channels:
            channel.forget()
        self.workspaces.clear()

    def receive_open(self) -> None:
        """As if all open hooks were called now."""
        for channel in self._channels:
            channel.receive_open()

    # ------------------------------------------------------------------ dispatch

    def dispatch(self, request: DecodeDispatchRequest) -> DecodeDispatched:
        """Send; receive, or return what will."""
        context, shape, stats = self._context, request.shape, request.stats
        check_limits(shape, context.num_ranks)
        x, weights = aligned(request.x), request.routing.topk_weights
        weights = None if weights is None else weights.contiguous()
        topk_idx = drop_ranks(request.routing.topk_idx, context.absent(), shape.num_experts // context.num_ranks)
        topk_idx = topk_idx.contiguous()
        signature = self._dispatch_signature(request, x, topk_idx, weights is not None)
        call = context.begin(signature, tolerant=True, wait_ns=address(stats.wait_ns))
        workspace = self.workspaces.fitting(call, shape, x.element_size())
        channel = self._channels[0]
        channel.make_room(call)
        result = self._results(shape, topk_idx, request, weights is not None)
        choices = prepared_choices(topk_idx, shape.num_experts)
        template = self._dispatch_template(workspace, shape, x, topk_idx, request)
        plan, rows = result.plan, result.x
        data, scale = (rows.data, rows.scale) if isinstance(rows, Quantized) else (rows, None)
        pointers = (
            x.data_ptr(), topk_idx.data_ptr(), address(weights), address(choices), data.data_ptr(), address(scale),
            result.expert_counts.data_ptr(), address(stats.received), plan.src_token.data_ptr(),
            plan.src_range.data_ptr(), address(plan.row_weights), address(plan.table), context.pinned.masked_address,
            address(self.trace),
        )  # fmt: skip

        def launch(phases: int, at: Call, _kept: Workspace = workspace) -> None:
            context.address(template, at)
            _SPREAD.pack_into(template.view, template.first + 64, *pointers)
            _SIZES.pack_into(template.view, type(template.params).num_tokens.offset, topk_idx.shape[0], phases)
            template.launch(self.num_blocks, at.stream)

        kept = (x, topk_idx, weights, choices, data, scale, plan.table, stats.received, stats.wait_ns, plan.row_weights)
        outputs = (*kept, result.expert_counts, plan.src_token, plan.src_range)
        hook = self._go(channel, call, launch, outputs, return_hook=request.return_hook)
        return DecodeDispatched(rows, result.expert_counts, plan, hook)

    def _dispatch_signature(
        self, request: DecodeDispatchRequest, x: Tensor, topk_idx: Tensor, weighted: bool
    ) -> Signature:
        shape = request.shape
        key = (0, shape, x.dtype, request.quantize, weighted, topk_idx.dtype)
        found = self._signatures.get(key)
        if found is None:
            found = self._signatures[key] = Signature(
                "decode_dispatch",
                num_experts=shape.num_experts,
                max_tokens=shape.max_tokens,
                dtype=dtype_code(x.dtype),
                fp8_scale=_SCALES[request.quantize],
                bytes_of_rows=x.shape[1] * x.element_size(),
                bytes_of_weights=4 * shape.top_k if weighted else 0,
                bytes_of_topk_idx=shape.top_k * topk_idx.element_size(),
            )
        return found

    def _results(
        self, shape: MoeShape, topk_idx: Tensor, request: DecodeDispatchRequest, weighted: bool
    ) -> DecodeDispatched:
        """Undefined results."""
        device, R, H = self._context.device, self._context.num_ranks, shape.hidden
        L, room = shape.num_experts // R, R * shape.max_tokens
        if request.quantize is None:
            x: Tensor | Quantized = torch.empty(L, room, H, dtype=request.x.dtype, device=device)
        else:
            groups = -(-H // 512) if request.quantize is Scale.UE8M0 else -(-H // 128)
            kind = torch.int32 if request.quantize is Scale.UE8M0 else torch.float32
            scale = torch.empty(L, groups, room, dtype=kind, device=device).transpose(1, 2)
            x = Quantized(torch.empty(L, room, H, dtype=torch.float8_e4m3fn, device=device), scale)
        plan = DecodePlan(
            group_key=self._key,
            num_tokens=topk_idx.shape[0],
            num_experts=shape.num_experts,
            topk_idx=topk_idx,
            topk_weights=request.routing.topk_weights,
            src_token=torch.empty(L, room, dtype=torch.int32, device=device),
            src_range=torch.empty(L, R, dtype=torch.int64, device=device),
            row_weights=torch.empty(L, room, dtype=torch.float32, device=device) if weighted else None,
            table=torch.empty(PLACES_WORD + room * shape.top_k, dtype=torch.int32, device=device),
        )
        return DecodeDispatched(x, torch.empty(L, dtype=torch.int32, device=device), plan, None)

    def _dispatch_template(
        self, workspace: Workspace, shape: MoeShape, x: Tensor, topk_idx: Tensor, request: DecodeDispatchRequest
    ) -> LaunchTemplate:
        context, fp8 = self._context, request.quantize
        weighted = request.routing.topk_weights is not None
        key = (decode_dispatch_spec.SPEC, workspace.number, shape, x.dtype, fp8, topk_idx.dtype, weighted)
        found = context.templates.get(key)
        if found is not None:
            return found
        kind = RAW if fp8 is None else TYPES[x.dtype]
        found = context.new_template(key, decode_dispatch_spec.SPEC, type=kind)
        p, num_local = found.params, shape.num_experts // context.num_ranks
        self._fill_workspace(found, workspace, workspace.rows_at, workspace.sizes.rows)
        p.notes_at, p.notes_stride, p.words_stride = workspace.notes_at, workspace.sizes.notes, workspace.sizes.words
        p.max_tokens, p.top_k, p.num_local, p.columns = shape.max_tokens, shape.top_k, num_local, shape.hidden
        p.row_units = shape.hidden * (x.element_size() if fp8 is None else 1) // 16
        p.scale_units = 0 if fp8 is None else -(-shape.hidden // 512)
        p.scale_format, p.per_local = _SCALES[fp8], 1 / num_local
        p.wide, p.weighted = int(topk_idx.dtype is torch.int64), int(weighted)
        found.block = decode_dispatch_spec.THREADS
        found.smem_bytes = decode_dispatch_spec.smem_bytes(
            shape.max_tokens * shape.top_k, shape.num_experts, context.num_ranks, shape.max_tokens
        )
        return found

    # ------------------------------------------------------------------ combine

    def combine(self, request: DecodeCombineRequest) -> DecodeCombined:
        """Send the rows home; receive the sums, or return what will."""
        context, plan, stats = self._context, request.plan, request.stats
        y, H = aligned(request.y), request.y.shape[-1]
        table, weights = plan.table, plan.topk_weights
        assert table is not None
        assert weights is not None
        topk_idx, weights = plan.topk_idx, weights.contiguous()
        shape = MoeShape(plan.num_experts, topk_idx.shape[1], H, y.shape[1] // context.num_ranks)
        key = (1, shape, y.dtype, request.fast, request.encoding)
        signature = self._signatures.get(key)
        if signature is None:
            signature = self._signatures[key] = Signature(
                "decode_combine",
                fast=int(request.fast),
                encoding=int(request.encoding),
                dtype=dtype_code(y.dtype),
                bytes_of_rows=H * y.element_size(),
            )
        call = context.begin(signature, tolerant=True, wait_ns=address(stats.wait_ns))
        workspace = self.workspaces.fitting(call, shape, y.element_size())
        channel = self._channels[1]
        channel.make_room(call)
        template = self._combine_template(workspace, shape, y, topk_idx, request)
        out = request.out
        if out is None or out.data_ptr() % 16 or overlap(out, y):
            out = torch.empty(plan.num_tokens, H, dtype=y.dtype, device=context.device)
        pending_words = torch.empty(2, dtype=torch.int32, device=context.device) if request.return_hook else None
        pointers = (
            y.data_ptr(), out.data_ptr(), topk_idx.data_ptr(), weights.data_ptr(), address(plan.row_weights),
            table.data_ptr(), address(pending_words), context.pinned.masked_address, address(self.trace),
        )  # fmt: skip

        def launch(phases: int, at: Call, _kept: Workspace = workspace) -> None:
            context.address(template, at)
            _COLLECT.pack_into(template.view, template.first + 64, *pointers)
            _SIZES.pack_into(template.view, type(template.params).num_tokens.offset, plan.num_tokens, phases)
            template.launch(self.num_blocks, at.stream)
            if phases & RECEIVE and request.out is not None and request.out is not out:
                request.out.copy_(out)

        kept = (y, out, topk_idx, weights, plan.row_weights, table, pending_words, stats.wait_ns)
        hook = self._go(channel, call, launch, kept, return_hook=request.return_hook)
        return DecodeCombined(out if request.out is None else request.out, hook)

    def _combine_template(
        self, workspace: Workspace, shape: MoeShape, y: Tensor, topk_idx: Tensor, request: DecodeCombineRequest
    ) -> LaunchTemplate:
        context = self._context
        key = (
            decode_combine_spec.SPEC,
            workspace.number,
            shape,
            y.dtype,
            topk_idx.dtype,
            request.fast,
            request.encoding,
        )
        found = context.templates.get(key)
        if found is not None:
            return found
        found = context.new_template(
            key, decode_combine_spec.SPEC, type=TYPES[y.dtype], fast=int(request.fast), encoding=int(request.encoding)
        )
        p = found.params
        self._fill_workspace(found, workspace, workspace.answers_at, workspace.sizes.answers)
        p.max_tokens, p.top_k, p.columns = shape.max_tokens, shape.top_k, shape.hidden
        p.num_local = shape.num_experts // context.num_ranks
        p.wide = int(topk_idx.dtype is torch.int64)
        found.block = decode_combine_spec.THREADS
        return found

    # ------------------------------------------------------------------ both

    def _fill_workspace(self, template: LaunchTemplate, workspace: Workspace, at: int, stride: int) -> None:
        p = template.params
        for rank, start in enumerate(workspace.addresses):
            p.workspaces[rank] = start
        p.packets_at, p.packets_stride = at, stride
        p.mask_late = int(self._context.mask_late)

    @property
    def num_blocks(self) -> int:
        """Blocks of a launch: one on each SM."""
        return max(2, self._context.num_sms)

    def _go(
        self,
        channel: Channel,
        call: Call,
        launch: Callable[[int, Call], None],
        tensors: tuple[Tensor | None, ...],
        *,
        return_hook: bool,
    ) -> Callable[[], None] | None:
        """Send and receive, or only send and return the hook that receives."""
        if not return_hook:
            launch(SEND | RECEIVE, call)
            channel.sent(None)
            return None
        launch(SEND, call)
        pending = PendingRecv(call, lambda at: launch(RECEIVE, at), tensors)
        channel.sent(pending)
        return lambda: channel.receive(pending)


def check_limits(shape: MoeShape, num_ranks: int) -> None:
    """Raise ConfigError for sizes that the kernels have no room for."""
    why_not = too_large(shape)
    if not why_not and shape.max_tokens > _MOST_TOKENS:
        why_not = f"max_tokens={shape.max_tokens}, and at most {_MOST_TOKENS} are possible in decode calls"
    if why_not:
        raise ConfigError(f"for_shape: backend cuda: {why_not}; use fewer, or a group with backend='cpu'")


def prepared_choices(topk_idx: Tensor, num_experts: int) -> Tensor | None:
    """The routing as the kernel wants it, if it is too large for a block to prepare; else None.

    Returns:
        Tensor: ``[T * K]`` int16: an expert, with the highest bit if it repeats an earlier slot's, or no expert.
    """
    if 2 * topk_idx.numel() <= decode_dispatch_spec.CHOICES_BYTES:
        return None
    good = (topk_idx >= 0) & (topk_idx < num_experts)
    codes = torch.where(good, topk_idx.int(), torch.where(topk_idx == -1, NONE, BAD))
    for k in range(1, topk_idx.shape[1]):
        again = (topk_idx[:, :k] == topk_idx[:, k : k + 1]).any(dim=1) & good[:, k]
        codes[:, k] += again.int() * REPEATED
    return codes.to(torch.int16).flatten()
