"""Decode calls of the CUDA backend: one kernel for each; with a hook two, one that sends and one that receives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenferry.backends.base import DecodeCombineRequest, DecodeDispatchRequest, no_hook
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.buffers import SymmetricAllocator, aligned
from tokenferry.backends.cuda.channel import Channel, PendingRecv
from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate
from tokenferry.backends.cuda.launch import address
from tokenferry.backends.cuda.plan import too_large
from tokenferry.backends.cuda.signature import Signature
from tokenferry.backends.cuda.workspace import Exchange, Workspace, Workspaces
from tokenferry.backends.tensors import drop_ranks, overlap
from tokenferry.errors import ConfigError
from tokenferry.formats.dtypes import dtype_code
from tokenferry.jit.params import Packer
from tokenferry.kernels.codes import RAW, TYPES
from tokenferry.kernels.control_block import TRACE_WORDS
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

_DISPATCH = Packer(
    decode_dispatch_spec.SPEC.params.struct,
    "x", "topk_idx", "weights", "choices", "out", "scale_out", "expert_counts", "received", "src_token", "src_range",
    "row_weights", "table", "masked_out", "trace",
)  # fmt: skip
_COMBINE = Packer(
    decode_combine_spec.SPEC.params.struct,
    "y", "out", "topk_idx", "weights", "row_weights", "table", "pending", "masked_out", "trace",
)  # fmt: skip
_DISPATCH_REST, _COMBINE_REST = (
    Packer(spec.params.struct, "num_tokens", "phases") for spec in (decode_dispatch_spec.SPEC, decode_combine_spec.SPEC)
)
_MAX_TOKENS = 1 << 16
"""Largest M; even with the most experts, places of rows stay far below 2^31."""
_MAX_SIGNATURES = 1024
_SCALE_CODES = {None: 0, Scale.FLOAT32: SCALE_FLOAT32, Scale.POWER_OF_TWO: SCALE_POWER_OF_TWO, Scale.UE8M0: SCALE_UE8M0}


class Decoder:
    """Decode calls of one rank.

    Args:
        context: Context of this rank.
        allocator: Allocator of blocks of the heap.
        key: Key of the group, which its plans carry.
        exchange: Collective function with which workspaces are made.

    Attributes:
        workspaces: Memory for rows under way.
        trace: ``[blocks, TRACE_WORDS]`` int64 zeros, to which kernels write time stamps; None: they do not.
    """

    def __init__(self, context: Context, allocator: SymmetricAllocator, key: str, exchange: Exchange) -> None:
        self._context = context
        self._key = key
        self.workspaces = Workspaces(context, allocator, exchange)
        self._channels = (Channel(context), Channel(context))
        self._signatures: BoundedDict[tuple[object, ...], Signature] = BoundedDict(_MAX_SIGNATURES)
        self.trace: Tensor | None = None

    def forget(self) -> None:
        """Drop pending receives, and empty the workspaces; nothing may be under way."""
        for channel in self._channels:
            channel.forget()
        self.workspaces.clear()

    def receive_open(self) -> None:
        """Enqueue all pending receives, as if their hooks were called now."""
        for channel in self._channels:
            channel.receive_open()

    def new_traces(self, num_calls: int) -> Tensor:
        """Return ``[num_calls, blocks, TRACE_WORDS]`` int64 zeros: a ``trace`` for each of several calls."""
        return torch.zeros(num_calls, self.num_blocks, TRACE_WORDS, dtype=torch.int64, device=self._context.device)

    # ------------------------------------------------------------------ dispatch

    def dispatch(self, request: DecodeDispatchRequest) -> DecodeDispatched[Tensor | Quantized]:
        """Send rows, and receive rows, or return a hook that receives them."""
        context, shape, stats = self._context, request.shape, request.stats
        check_limits(shape, context.num_ranks)
        x, weights = aligned(request.x), request.routing.topk_weights
        weights = None if weights is None else weights.contiguous()
        num_local = shape.num_experts // context.num_ranks
        topk_idx = drop_ranks(request.routing.topk_idx, context.masked_ranks(), num_local).contiguous()
        signature = self._dispatch_signature(request, x, topk_idx, weights is not None)
        call = context.begin(signature, skip_masked=True, wait_ns=address(stats.wait_ns))
        workspace = self.workspaces.fitting(call, shape, x.element_size())
        channel = self._channels[0]
        channel.receive_overwritten(call)
        result = self._results(shape, topk_idx, request, weights is not None)
        choices = prepared_choices(topk_idx, shape.num_experts)
        template = self._dispatch_template(workspace, shape, x, topk_idx, request)
        plan, rows = result.plan, result.x
        data, scale = (rows.data, rows.scale) if isinstance(rows, Quantized) else (rows, None)
        pointers = (
            x.data_ptr(), topk_idx.data_ptr(), address(weights), address(choices), data.data_ptr(), address(scale),
            result.expert_counts.data_ptr(), address(stats.received), plan.src_token.data_ptr(),
            plan.src_range.data_ptr(), address(plan.row_weights), address(plan._table), context.pinned.masked_address,
            address(self.trace),
        )  # fmt: skip

        def launch(phases: int, at: Call, _kept: Workspace = workspace) -> None:
            template.set_call(at)
            template.pack(*pointers)
            template.pack_rest(topk_idx.shape[0], phases)
            template.launch(self.num_blocks, at.stream)

        inputs = (x, topk_idx, weights, choices, plan._table, plan.row_weights, stats.received, stats.wait_ns)
        outputs = (*inputs, data, scale, result.expert_counts, plan.src_token, plan.src_range)
        hook = self._enqueue(channel, call, launch, outputs, return_hook=request.return_hook)
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
                fp8_scale=_SCALE_CODES[request.quantize],
                bytes_of_rows=x.shape[1] * x.element_size(),
                bytes_of_weights=4 * shape.top_k if weighted else 0,
                bytes_of_topk_idx=shape.top_k * topk_idx.element_size(),
            )
        return found

    def _results(
        self, shape: MoeShape, topk_idx: Tensor, request: DecodeDispatchRequest, weighted: bool
    ) -> DecodeDispatched[Tensor | Quantized]:
        """Return tensors for the results, undefined."""
        device, R, H = self._context.device, self._context.num_ranks, shape.hidden
        L, capacity = shape.num_experts // R, R * shape.max_tokens
        if request.quantize is None:
            x: Tensor | Quantized = torch.empty(L, capacity, H, dtype=request.x.dtype, device=device)
        else:
            groups = -(-H // 512) if request.quantize is Scale.UE8M0 else -(-H // 128)
            kind = torch.int32 if request.quantize is Scale.UE8M0 else torch.float32
            scale = torch.empty(L, groups, capacity, dtype=kind, device=device).transpose(1, 2)
            x = Quantized(torch.empty(L, capacity, H, dtype=torch.float8_e4m3fn, device=device), scale)
        plan = DecodePlan(
            group_key=self._key,
            num_tokens=topk_idx.shape[0],
            num_experts=shape.num_experts,
            topk_idx=topk_idx,
            topk_weights=request.routing.topk_weights,
            src_token=torch.empty(L, capacity, dtype=torch.int32, device=device),
            src_range=torch.empty(L, R, dtype=torch.int64, device=device),
            row_weights=torch.empty(L, capacity, dtype=torch.float32, device=device) if weighted else None,
            _table=torch.empty(PLACES_WORD + capacity * shape.top_k, dtype=torch.int32, device=device),
        )
        return DecodeDispatched(x, torch.empty(L, dtype=torch.int32, device=device), plan, no_hook)

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
        template = context.new_template(decode_dispatch_spec.SPEC, type=kind)
        p, num_local = template.params, shape.num_experts // context.num_ranks
        template.pack, template.pack_rest = _DISPATCH.bind(p), _DISPATCH_REST.bind(p)
        self._set_workspace(p, workspace)
        p.packets_at, p.packets_stride = workspace.rows_at, workspace.sizes.rows
        p.notes_at, p.notes_stride, p.words_stride = workspace.notes_at, workspace.sizes.notes, workspace.sizes.words
        p.max_tokens, p.top_k, p.num_local, p.columns = shape.max_tokens, shape.top_k, num_local, shape.hidden
        p.row_units = shape.hidden * (x.element_size() if fp8 is None else 1) // 16
        p.scale_units = 0 if fp8 is None else -(-shape.hidden // 512)
        p.scale_format, p.per_local = _SCALE_CODES[fp8], 1 / num_local
        p.wide, p.weighted = int(topk_idx.dtype is torch.int64), int(weighted)
        template.block = decode_dispatch_spec.THREADS
        template.smem_bytes = decode_dispatch_spec.smem_bytes(
            shape.max_tokens * shape.top_k, shape.num_experts, context.num_ranks, shape.max_tokens
        )
        context.templates[key] = template
        return template

    # ------------------------------------------------------------------ combine

    def combine(self, request: DecodeCombineRequest) -> DecodeCombined:
        """Send rows back, and receive and add up, or return a hook that does."""
        context, plan, stats = self._context, request.plan, request.stats
        y, H = aligned(request.y), request.y.shape[-1]
        table, weights = plan._table, plan.topk_weights
        assert table is not None
        assert weights is not None
        topk_idx, weights = plan.topk_idx, weights.contiguous()
        shape = MoeShape(plan.num_experts, topk_idx.shape[1], H, y.shape[1] // context.num_ranks)
        signature = self._combine_signature(request, shape)
        call = context.begin(signature, skip_masked=True, wait_ns=address(stats.wait_ns))
        workspace = self.workspaces.fitting(call, shape, y.element_size())
        channel = self._channels[1]
        channel.receive_overwritten(call)
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
            template.set_call(at)
            template.pack(*pointers)
            template.pack_rest(plan.num_tokens, phases)
            template.launch(self.num_blocks, at.stream)
            if phases & RECEIVE and request.out is not None and request.out is not out:
                with torch.inference_mode():  # `out` may come from it
                    request.out.copy_(out)

        kept = (y, out, topk_idx, weights, plan.row_weights, table, pending_words, stats.wait_ns)
        hook = self._enqueue(channel, call, launch, kept, return_hook=request.return_hook)
        return DecodeCombined(out if request.out is None else request.out, hook)

    def _combine_signature(self, request: DecodeCombineRequest, shape: MoeShape) -> Signature:
        y = request.y
        key = (1, shape, y.dtype, request.fast, request.encoding)
        found = self._signatures.get(key)
        if found is None:
            found = self._signatures[key] = Signature(
                "decode_combine",
                fast=int(request.fast),
                encoding=int(request.encoding),
                dtype=dtype_code(y.dtype),
                bytes_of_rows=shape.hidden * y.element_size(),
            )
        return found

    def _combine_template(
        self, workspace: Workspace, shape: MoeShape, y: Tensor, topk_idx: Tensor, request: DecodeCombineRequest
    ) -> LaunchTemplate:
        context, fast, encoding = self._context, request.fast, request.encoding
        key = (decode_combine_spec.SPEC, workspace.number, shape, y.dtype, topk_idx.dtype, fast, encoding)
        found = context.templates.get(key)
        if found is not None:
            return found
        template = context.new_template(
            decode_combine_spec.SPEC, type=TYPES[y.dtype], fast=int(fast), encoding=int(encoding)
        )
        p = template.params
        template.pack, template.pack_rest = _COMBINE.bind(p), _COMBINE_REST.bind(p)
        self._set_workspace(p, workspace)
        p.packets_at, p.packets_stride = workspace.answers_at, workspace.sizes.answers
        p.max_tokens, p.top_k, p.columns = shape.max_tokens, shape.top_k, shape.hidden
        p.num_local = shape.num_experts // context.num_ranks
        p.wide = int(topk_idx.dtype is torch.int64)
        template.block = decode_combine_spec.THREADS
        context.templates[key] = template
        return template

    # ------------------------------------------------------------------ both

    def _set_workspace(self, params: Any, workspace: Workspace) -> None:  # noqa: ANN401 - fields of a params struct
        for rank, start in enumerate(workspace.addresses):
            params.workspaces[rank] = start
        params.mask_late = int(self._context.mask_late)

    @property
    def num_blocks(self) -> int:
        """Number of blocks of a launch: one for each SM."""
        return max(2, self._context.num_sms)

    def _enqueue(
        self,
        channel: Channel,
        call: Call,
        launch: Callable[[int, Call], None],
        tensors: tuple[Tensor | None, ...],
        *,
        return_hook: bool,
    ) -> Callable[[], None]:
        """Enqueue a kernel that sends and receives, or one that sends; then return the hook that receives."""
        if not return_hook:
            launch(SEND | RECEIVE, call)
            channel.sent(None)
            return no_hook
        launch(SEND, call)
        pending = PendingRecv(call, lambda at: launch(RECEIVE, at), tensors)
        channel.sent(pending)
        return lambda: channel.receive(pending)


def check_limits(shape: MoeShape, num_ranks: int) -> None:
    """Raise ConfigError for sizes that are too large for the kernels."""
    why_not = too_large(shape)
    if not why_not and shape.max_tokens > _MAX_TOKENS:
        why_not = f"max_tokens={shape.max_tokens}, and at most {_MAX_TOKENS} are possible in decode calls"
    if why_not:
        raise ConfigError(f"for_shape: backend cuda: {why_not}; use fewer, or a group with backend='cpu'")


def prepared_choices(topk_idx: Tensor, num_experts: int) -> Tensor | None:
    """Return a routing in the form that blocks prepare for themselves; None if it is small enough for them to do so.

    Returns:
        Tensor: ``[T * K]`` int16: an expert, with the highest bit set if an earlier slot of the token has chosen it,
        too; or a code for no expert.
    """
    if 2 * topk_idx.numel() <= decode_dispatch_spec.CHOICES_BYTES:
        return None
    good = (topk_idx >= 0) & (topk_idx < num_experts)
    codes = torch.where(good, topk_idx.int(), torch.where(topk_idx == -1, NONE, BAD))
    for k in range(1, topk_idx.shape[1]):
        again = (topk_idx[:, :k] == topk_idx[:, k : k + 1]).any(dim=1) & good[:, k]
        codes[:, k] += again.int() * REPEATED
    return codes.to(torch.int16).flatten()
