"""Decode calls of the CUDA backend: one kernel for each; with a hook two, one that sends and one that receives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenferry.backends.base import DecodeCombineRequest, DecodeDispatchRequest, Encoding, no_hook, not_received
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.buffers import SymmetricAllocator, aligned
from tokenferry.backends.cuda.channel import Channel, PendingRecv
from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate
from tokenferry.backends.cuda.decode_forms import (
    CombineKind,
    DecodeCombineForm,
    DecodeDispatchForm,
    DispatchKind,
    LazyDecodeDispatched,
    LazyDecodePlan,
    new_combine_form,
    new_dispatch_form,
)
from tokenferry.backends.cuda.launch import address
from tokenferry.backends.cuda.plan import too_large
from tokenferry.backends.cuda.signature import Signature
from tokenferry.backends.cuda.workspace import Workspace, Workspaces
from tokenferry.backends.tensors import drop_ranks, may_write_to
from tokenferry.errors import ConfigError
from tokenferry.kernels.control_block import TRACE_WORDS
from tokenferry.kernels.decode_words import BAD, NONE, RECEIVE, REPEATED, SEND
from tokenferry.types import DecodeCombined, DecodeDispatched, DecodePlan, DecodeStats, MoeShape, Quantized, Routing

_MAX_TOKENS = 1 << 16
"""Largest M; even with the most experts, places of rows stay far below 2^31."""
_MAX_FORMS = 256


class PlanParts(NamedTuple):
    """What the kernel of a combine reads of a plan.

    Attributes:
        topk_idx: `DecodePlan.topk_idx`.
        topk_weights: `DecodePlan.topk_weights`.
        row_weights: Address of `DecodePlan.row_weights`, or 0.
        table: Address of `DecodePlan._table`.
        num_tokens: T.
        kept: Tensors to keep until the kernel has run, besides these.
    """

    topk_idx: Tensor
    topk_weights: Tensor
    row_weights: int
    table: int
    num_tokens: int
    kept: tuple[Tensor | None, ...]


class Copy(NamedTuple):
    """A copy to make once a combine is complete, into a tensor that its kernel cannot write.

    Attributes:
        source: The sums.
        to: Where the caller wants them.
    """

    source: Tensor
    to: Tensor


def parts_of(plan: DecodePlan, topk_weights: Tensor, wait_ns: Tensor | None) -> PlanParts:
    """Return what the kernel of a combine reads of a plan, and what it needs to be alive.

    Args:
        plan: The plan.
        topk_weights: Its weights, contiguous.
        wait_ns: `DecodeStats.wait_ns`.
    """
    if isinstance(plan, LazyDecodePlan):
        form, at = plan._form, plan._words.data_ptr()
        row_weights = at + 4 * form.layout.row_weights if form.weighted else 0
        return PlanParts(
            plan.topk_idx,
            topk_weights,
            row_weights,
            at + 4 * form.layout.table,
            plan.num_tokens,
            (plan._words, wait_ns),
        )
    table, row_weights = address(plan._table), address(plan.row_weights)
    return PlanParts(
        plan.topk_idx, topk_weights, row_weights, table, plan.num_tokens, (plan._table, plan.row_weights, wait_ns)
    )


class Decoding(ABC):
    """Decode calls of one rank, in one node or across nodes.

    Args:
        context: Context of this rank.
        allocator: Allocator of blocks of the heap.
        key: Key of the group, which its plans carry.

    Attributes:
        workspaces: Memory for rows under way.
        num_blocks: Number of blocks of a launch: one for each SM.
        trace: ``[blocks, TRACE_WORDS]`` int64 zeros, to which kernels write time stamps; None: they do not.
    """

    def __init__(self, context: Context, allocator: SymmetricAllocator, key: str) -> None:
        self._context = context
        self._key = key
        self.workspaces = Workspaces(context, allocator)
        self.num_blocks = max(2, context.num_sms)
        self._channels = (Channel(context), Channel(context))
        self.trace: Tensor | None = None

    def meet(self) -> None:
        """Wait until all ranks are here, but for masked ones; collective. As a decode call, it masks late ranks.

        It is no call that users count: its number is 0, as that of making the group.

        Raises:
            ArgumentError: a CUDA graph is being captured.
            MismatchError, PeerTimeout: as in a decode call.
        """
        context, signature = self._context, Signature("warmup")
        alive = sum(1 << rank for rank in range(context.num_ranks) if rank not in context.masked_ranks())
        context.flight_recorder.note(0, signature)
        self.workspaces.meet(context.resume(Call(0, 0, False, alive, signature, 0)))

    def resynchronise(self, ranks: list[int]) -> None:
        """Drop pending receives, and empty the workspaces; nothing may be under way.

        Args:
            ranks: The ranks that resynchronise.
        """
        for channel in self._channels:
            channel.forget()
        self.workspaces.resynchronise(ranks)

    def close(self) -> None:
        """Give back all memory: the window is freed with its last block. The group has been closed."""
        for channel in self._channels:
            channel.close()
        self.workspaces.close()

    def receive_open(self) -> None:
        """Enqueue all pending receives, as if their hooks were called now."""
        for channel in self._channels:
            channel.receive_open()

    def new_traces(self, num_calls: int) -> Tensor:
        """Return ``[num_calls, blocks, TRACE_WORDS]`` int64 zeros: a ``trace`` for each of several calls."""
        return torch.zeros(num_calls, self.num_blocks, TRACE_WORDS, dtype=torch.int64, device=self._context.device)

    @abstractmethod
    def waits_of(self, stats: DecodeStats) -> int:
        """Return the address of ``stats.wait_ns`` of the first rank that kernels wait for, or 0; see `Call`."""

    @abstractmethod
    def without_masked(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        """Return a routing to E experts with -1 for those of masked ranks, contiguous."""

    @abstractmethod
    def dispatch(self, request: DecodeDispatchRequest) -> DecodeDispatched[Tensor | Quantized]:
        """Send rows, and receive rows, or return a hook that receives them."""

    @abstractmethod
    def known_dispatch(self, kind: DispatchKind) -> Any:  # noqa: ANN401 - a form
        """Return the form of a dispatch if one like it has been made, and the memory for its rows is still in use."""

    @abstractmethod
    def send(
        self,
        form: Any,  # noqa: ANN401
        call: Call,
        x: Tensor,
        routing: Routing,
        weights_of_plan: Tensor | None,
        stats: DecodeStats,
        *,
        return_hook: bool,
    ) -> DecodeDispatched[Any]:
        """Send rows, and receive rows, or return a hook that receives them.

        Args:
            form: The form of the call.
            call: The call.
            x: ``[T, H]``, contiguous, at a multiple of 16 bytes.
            routing: What the kernel reads, contiguous, with -1 for experts of masked ranks.
            weights_of_plan: `DecodePlan.topk_weights`.
            stats: Counters.
            return_hook: Whether the caller receives with a hook.
        """

    @abstractmethod
    def combine(self, request: DecodeCombineRequest) -> DecodeCombined:
        """Send rows back, and receive and add up, or return a hook that does."""

    @abstractmethod
    def known_combine(
        self, of: DecodeDispatchForm, y: Tensor, topk_dtype: torch.dtype, encoding: Encoding, *, fast: bool
    ) -> Any:  # noqa: ANN401 - a form
        """Return the form of a combine along a plan of a form, as `known_dispatch`; ``topk_dtype``: of the plan."""

    @abstractmethod
    def send_back(
        self,
        form: Any,  # noqa: ANN401
        call: Call,
        y: Tensor,
        plan: PlanParts,
        out: Tensor | None,
        copy_to: Tensor | None,
        *,
        return_hook: bool,
    ) -> DecodeCombined:
        """Send rows back, and receive and add up, or return a hook that does.

        Args:
            form: The form of the call.
            call: The call.
            y: ``[L, R * M, H]``, contiguous, at a multiple of 16 bytes.
            plan: What the kernel reads of the plan.
            out: ``[T, H]`` for the sums, at a multiple of 16 bytes; None: a new tensor.
            copy_to: ``[T, H]`` to which the sums are copied, or None.
            return_hook: Whether the caller receives with a hook.
        """


class Decoder(Decoding):
    """Decode calls of one rank in one node; see `Decoding`."""

    def __init__(self, context: Context, allocator: SymmetricAllocator, key: str) -> None:
        super().__init__(context, allocator, key)
        self._dispatches: BoundedDict[DispatchKind, DecodeDispatchForm] = BoundedDict(_MAX_FORMS)
        self._combines: BoundedDict[CombineKind, DecodeCombineForm] = BoundedDict(_MAX_FORMS)

    def waits_of(self, stats: DecodeStats) -> int:
        """See `Decoding.waits_of`."""
        return address(stats.wait_ns)

    def without_masked(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        """See `Decoding.without_masked`."""
        context = self._context
        return drop_ranks(topk_idx, context.masked_ranks(), num_experts // context.num_ranks).contiguous()

    # ------------------------------------------------------------------ dispatch

    def dispatch(self, request: DecodeDispatchRequest) -> DecodeDispatched[Tensor | Quantized]:
        """See `Decoding.dispatch`."""
        context, shape, stats = self._context, request.shape, request.stats
        check_limits(shape)
        x, weights = aligned(request.x), request.routing.topk_weights
        weights = None if weights is None else weights.contiguous()
        topk_idx = self.without_masked(request.routing.topk_idx, shape.num_experts)
        kind = DispatchKind(shape, x.dtype, request.quantize, topk_idx.dtype, weights is not None)
        known = self._dispatches.get(kind)
        signature = known.signature if known is not None else kind.signature()
        call = context.begin(signature, skip_masked=True, wait_ns=self.waits_of(stats))
        workspace = self.workspaces.fitting(call, shape, x.element_size())
        if known is None or known.workspace != workspace.number:
            known = self._dispatches[kind] = new_dispatch_form(context, self._key, signature, workspace, kind)
        routing = Routing(topk_idx, weights)
        return self.send(known, call, x, routing, request.routing.topk_weights, stats, return_hook=request.return_hook)

    def known_dispatch(self, kind: DispatchKind) -> DecodeDispatchForm | None:
        """See `Decoding.known_dispatch`."""
        form = self._dispatches.get(kind)
        return form if form is not None and form.workspace == self.workspaces.number else None

    def send(
        self,
        form: DecodeDispatchForm,
        call: Call,
        x: Tensor,
        routing: Routing,
        weights_of_plan: Tensor | None,
        stats: DecodeStats,
        *,
        return_hook: bool,
    ) -> DecodeDispatched[Any]:
        """See `Decoding.send`."""
        context, layout, channel = self._context, form.layout, self._channels[0]
        if not channel.idle:
            channel.receive_overwritten(call)
        topk_idx, weights, empty = routing.topk_idx, routing.topk_weights, context.empty
        data, words = empty(*form.rows), empty(*form.words)
        scale = None if form.scale is None else empty(*form.scale)
        choices = prepared_choices(topk_idx, form.shape.num_experts, form.kept_bytes)
        at, num_tokens = words.data_ptr(), topk_idx.shape[0]
        result, plan = object.__new__(LazyDecodeDispatched), object.__new__(LazyDecodePlan)
        plan._form, plan._words, plan._made, plan._call_number, plan.num_tokens = form, words, {}, 0, num_tokens
        plan.topk_idx, plan.topk_weights = topk_idx, weights_of_plan
        result.x, result.plan = data if scale is None else Quantized(data, scale), plan
        pointers = (
            x.data_ptr(), topk_idx.data_ptr(), address(weights), address(choices), data.data_ptr(), address(scale),
            at + 4 * layout.expert_counts, address(stats.received), at + 4 * layout.src_token,
            at + 4 * layout.src_range, at + 4 * layout.row_weights if form.weighted else 0, at + 4 * layout.table,
            context.pinned.masked_address, address(self.trace), num_tokens,
        )  # fmt: skip

        if return_hook:
            tensors = (x, topk_idx, weights, choices, words, stats.received, stats.wait_ns, data, scale)
            plan._pending, result.hook = self._send_alone(channel, form.kernel, call, pointers, tensors)
        else:
            plan._pending = None
            self._launch(form.kernel, call, pointers, SEND | RECEIVE)
            if not channel.idle:
                channel.sent(None)
            result.hook = no_hook
        return result

    # ------------------------------------------------------------------ combine

    def combine(self, request: DecodeCombineRequest) -> DecodeCombined:
        """See `Decoding.combine`."""
        context, plan, stats, y = self._context, request.plan, request.stats, aligned(request.y)
        assert plan._table is not None
        if not self._channels[0].idle and self._channels[0].fills(plan._table):
            raise not_received()
        assert plan.topk_weights is not None
        topk_idx, weights = plan.topk_idx, plan.topk_weights.contiguous()
        shape = MoeShape(plan.num_experts, topk_idx.shape[1], y.shape[-1], y.shape[1] // context.num_ranks)
        kind = CombineKind(shape, y.dtype, request.fast, request.encoding, topk_idx.dtype)
        known = self._combines.get(kind)
        signature = known.signature if known is not None else kind.signature()
        call = context.begin(signature, skip_masked=True, wait_ns=self.waits_of(stats))
        workspace = self.workspaces.fitting(call, shape, y.element_size())
        if known is None or known.workspace != workspace.number:
            known = self._combines[kind] = new_combine_form(context, signature, workspace, kind)
        out = request.out
        if out is not None and (out.data_ptr() % 16 or not may_write_to(out, y)):
            out = None
        parts = parts_of(plan, weights, stats.wait_ns)
        copy_to = None if request.out is out else request.out
        return self.send_back(known, call, y, parts, out, copy_to, return_hook=request.return_hook)

    def known_combine(
        self, of: DecodeDispatchForm, y: Tensor, topk_dtype: torch.dtype, encoding: Encoding, *, fast: bool
    ) -> DecodeCombineForm | None:
        """See `Decoding.known_combine`."""
        shape = MoeShape(of.shape.num_experts, of.shape.top_k, y.shape[2], of.shape.max_tokens)
        form = self._combines.get(CombineKind(shape, y.dtype, fast, encoding, topk_dtype))
        return form if form is not None and form.workspace == self.workspaces.number else None

    def send_back(
        self,
        form: DecodeCombineForm,
        call: Call,
        y: Tensor,
        plan: PlanParts,
        out: Tensor | None,
        copy_to: Tensor | None,
        *,
        return_hook: bool,
    ) -> DecodeCombined:
        """See `Decoding.send_back`."""
        context, channel = self._context, self._channels[1]
        if not channel.idle:
            channel.receive_overwritten(call)
        if out is None:
            hidden = y.shape[2]
            out = context.empty((plan.num_tokens, hidden), (hidden, 1), y.dtype)
        pending_words = context.empty((2,), (1,), torch.int32) if return_hook else None
        pointers = (
            y.data_ptr(), out.data_ptr(), plan.topk_idx.data_ptr(), plan.topk_weights.data_ptr(), plan.row_weights,
            plan.table, address(pending_words), context.pinned.masked_address, address(self.trace), plan.num_tokens,
        )  # fmt: skip

        copy = None if copy_to is None else Copy(out, copy_to)
        done = out if copy_to is None else copy_to
        if return_hook:
            kept = (y, out, plan.topk_idx, plan.topk_weights, *plan.kept, pending_words)
            return DecodeCombined(done, self._send_alone(channel, form.kernel, call, pointers, kept, copy)[1])
        self._launch(form.kernel, call, pointers, SEND | RECEIVE, copy)
        if not channel.idle:
            channel.sent(None)
        return DecodeCombined(done, no_hook)

    # ------------------------------------------------------------------ both

    def _launch(
        self, kernel: LaunchTemplate, call: Call, pointers: tuple[int, ...], phases: int, copy: Copy | None = None
    ) -> None:
        """Enqueue a kernel for some phases of a call, and the copy of what it receives."""
        kernel.pack(call.wait_ns, call.alive, call.number, call.signature.words, *pointers, phases)
        kernel.launch(self.num_blocks, call.stream)
        if copy is not None and phases & RECEIVE:
            with torch.inference_mode():  # the tensor may come from it
                copy.to.copy_(copy.source)

    def _send_alone(
        self,
        channel: Channel,
        kernel: LaunchTemplate,
        call: Call,
        pointers: tuple[int, ...],
        tensors: tuple[Tensor | None, ...],
        copy: Copy | None = None,
    ) -> tuple[PendingRecv, Callable[[], None]]:
        """Enqueue a kernel that sends; return what is pending, and the hook that receives it."""
        self._launch(kernel, call, pointers, SEND)

        def receive(at: Call, _kept: Workspace | None = self.workspaces.now) -> None:
            self._launch(kernel, at, pointers, RECEIVE, copy)

        pending = PendingRecv(call, receive, tensors)
        channel.sent(pending)
        return pending, partial(channel.receive, pending)


def check_limits(shape: MoeShape) -> None:
    """Raise ConfigError for sizes that are too large for the kernels."""
    why_not = too_large(shape)
    if not why_not and shape.max_tokens > _MAX_TOKENS:
        why_not = f"max_tokens={shape.max_tokens}, and at most {_MAX_TOKENS} are possible in decode calls"
    if why_not:
        raise ConfigError(f"for_shape: backend cuda: {why_not}; use fewer, or a group with backend='cpu'")


def prepared_choices(topk_idx: Tensor, num_experts: int, kept_bytes: int) -> Tensor | None:
    """Return a routing in the form that blocks prepare for themselves; None if it is small enough for them to do so.

    Args:
        topk_idx: ``[T, K]``.
        num_experts: E.
        kept_bytes: Bytes of the largest one that blocks keep.

    Returns:
        Tensor: ``[T * K]`` int16: an expert, with the highest bit set if an earlier slot of the token has chosen it,
        too; or a code for no expert.
    """
    if 2 * topk_idx.numel() <= kept_bytes:
        return None
    good = (topk_idx >= 0) & (topk_idx < num_experts)
    codes = torch.where(good, topk_idx.int(), torch.where(topk_idx == -1, NONE, BAD))
    for k in range(1, topk_idx.shape[1]):
        again = (topk_idx[:, :k] == topk_idx[:, k : k + 1]).any(dim=1) & good[:, k]
        codes[:, k] += again.int() * REPEATED
    return codes.to(torch.int16).flatten()
