"""Decode calls of the CPU backend: fixed shapes, FP8 casts and weighted sums, receive hooks, masked ranks.

A call has two halves. The first casts, packs and sends; the second, which may be a hook, receives and then arranges or
sums the rows. The first half allocates all results, so that a hook only fills them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tokenferry.ambient import not_compiled
from tokenferry.backends.base import DecodeCombineRequest, DecodeDispatchRequest, no_hook, not_received
from tokenferry.backends.cpu import routing as cpu_routing
from tokenferry.backends.cpu.allocator import Allocator
from tokenferry.backends.cpu.decode_direct import DirectCombine, DirectDispatch
from tokenferry.backends.cpu.decode_nodes import NodeCombine, NodeDispatch
from tokenferry.backends.cpu.decode_rows import packed_ranges
from tokenferry.backends.cpu.exchange import PLAN_FIELD, CallKind, Exchange, Signature
from tokenferry.backends.cpu.levels import Levels
from tokenferry.backends.cpu.payload import Payload, ReceivedRows
from tokenferry.backends.tensors import drop_ranks, without_autocast
from tokenferry.errors import CapacityError
from tokenferry.formats import fp8
from tokenferry.formats.dtypes import dtype_code
from tokenferry.transports.base import Deadline
from tokenferry.types import DecodeCombined, DecodeDispatched, DecodePlan, Quantized

_NOT_RECEIVED = -1
"""In ``DecodePlan.src_range`` until the rows have been received: a number of no range."""


class PendingDispatch(Protocol):
    """The rows of a dispatch on their way.

    Attributes:
        number: The number of the call, the same on all ranks.
        relayed: ``DecodePlan._table``; complete when the rows have been received.
    """

    @property
    def number(self) -> int: ...  # noqa: D102

    @property
    def relayed(self) -> Tensor | None: ...  # noqa: D102

    @property
    def aborted(self) -> bool:
        """See `Pending.aborted`."""
        ...

    def receive(
        self, deadline: Deadline, wait_ns: Tensor | None
    ) -> contextlib.AbstractContextManager[Sequence[ReceivedRows]]:
        """Wait for all rows, after `Exchange.catch_up`; yields them by source rank, to be read in the ``with`` block.

        Raises:
            CapacityError: a rank had more tokens for another node than there are slots; raised on all ranks.
        """
        ...


class PendingCombine(Protocol):
    """The rows of a combine on their way."""

    @property
    def aborted(self) -> bool:
        """See `Pending.aborted`."""
        ...

    def receive(self, out: Tensor, deadline: Deadline) -> None:
        """Wait for all rows, after `Exchange.catch_up`, and write their sums."""
        ...


class Decoder:
    """Makes the decode calls of a group.

    Args:
        exchange: Reaches all ranks.
        levels: The nodes, if calls use two levels: there are several nodes, and no rank is masked on a timeout. While
            ranks are masked by hand, rows are sent directly: the rank that would pass them on may be one of those.
        key: That of the group.
    """

    def __init__(self, exchange: Exchange, levels: Levels | None, key: str) -> None:
        self._exchange = exchange
        self._levels = levels
        self._key = key

    @without_autocast
    def dispatch(self, request: DecodeDispatchRequest) -> DecodeDispatched[Tensor | Quantized]:
        """Cast and send the rows; then, at once or in the hook, arrange those that arrive as ``[L, R*M, H]``."""
        exchange, shape, routing = self._exchange, request.shape, request.routing
        num_ranks, num_local = exchange.num_ranks, shape.num_experts // exchange.num_ranks
        topk_idx = drop_ranks(routing.topk_idx, frozenset(exchange.masked), num_local)
        rows: Tensor | Quantized = request.x if request.quantize is None else fp8.cast(request.x, request.quantize)
        payload = Payload(
            rows.data if isinstance(rows, Quantized) else rows,
            scale=rows.scale if isinstance(rows, Quantized) else None,
            weights=routing.topk_weights,
            topk_idx=topk_idx,
            token=torch.arange(topk_idx.shape[0], dtype=torch.int64, device="cpu"),
        )
        pending = self._send(request, payload, topk_idx)
        num_rows = num_ranks * shape.max_tokens
        weighted = routing.topk_weights is not None
        row_weights = torch.empty(num_local, num_rows, dtype=torch.float32, device="cpu") if weighted else None
        result = DecodeDispatched(
            x=_empty_like(rows, num_local, num_rows, exchange.allocator),
            expert_counts=torch.empty(num_local, dtype=torch.int32, device="cpu"),
            plan=DecodePlan(
                group_key=self._key,
                num_tokens=topk_idx.shape[0],
                num_experts=shape.num_experts,
                topk_idx=topk_idx,
                topk_weights=routing.topk_weights,
                src_token=torch.empty(num_local, num_rows, dtype=torch.int32, device="cpu"),
                src_range=torch.full((num_local, num_ranks), _NOT_RECEIVED, dtype=torch.int64, device="cpu"),
                row_weights=row_weights,
                _call_number=pending.number,
                _table=pending.relayed,
            ),
            hook=no_hook,
        )

        def receive(deadline: Deadline) -> None:
            with pending.receive(deadline, request.stats.wait_ns) as received:
                _arrange(result, payload, received, exchange.allocator, first=exchange.rank * num_local)
            if request.stats.received is not None:
                request.stats.received.add_(result.expert_counts)

        hook = self._finish("decode_dispatch", pending, receive, return_hook=request.return_hook)
        return DecodeDispatched(result.x, result.expert_counts, result.plan, hook)

    @without_autocast
    def combine(self, request: DecodeCombineRequest) -> DecodeCombined:
        """Send the experts' rows back, if ``fast`` weighted and summed per token; then sum the rows that arrive."""
        exchange, plan, levels = self._exchange, request.plan, self._direct_or_levels()
        if (plan.src_range == _NOT_RECEIVED).any():
            raise not_received()
        fields = {
            PLAN_FIELD: plan._call_number,
            "fast": int(request.fast),
            "encoding": int(request.encoding),
            "dtype": dtype_code(request.y.dtype),
            **self._fields_of_nodes(),
        }
        signature = Signature(CallKind.decode_combine, fields)
        pending: PendingCombine
        if levels is None:
            pending = DirectCombine(exchange, signature, request)
        else:
            pending = NodeCombine(levels, signature, request)
        out = request.out
        if out is None:
            out = exchange.allocator.empty(plan.num_tokens, request.y.shape[-1], dtype=request.y.dtype)
        receive = partial(pending.receive, out)
        return DecodeCombined(out, self._finish("decode_combine", pending, receive, return_hook=request.return_hook))

    def _direct_or_levels(self) -> Levels | None:
        return None if self._exchange.masked else self._levels

    def _fields_of_nodes(self) -> dict[str, int]:
        """Return what ranks of several nodes must agree on: else some would wait for rows that take another way."""
        return {} if self._levels is None else {"whether ranks are masked": int(bool(self._exchange.masked))}

    def _send(self, request: DecodeDispatchRequest, payload: Payload, topk_idx: Tensor) -> PendingDispatch:
        """Send each rank the rows that its experts need."""
        shape, quantize, levels = request.shape, request.quantize, self._direct_or_levels()
        fields = {
            "num_experts": shape.num_experts,
            "top_k": shape.top_k,
            "max_tokens": shape.max_tokens,
            "node_slots": shape.node_slots or 0,
            "dtype": dtype_code(request.x.dtype),
            "fp8 scale": 0 if quantize is None else 1 + list(type(quantize)).index(quantize),
            **self._fields_of_nodes(),
            **payload.fields,
        }
        signature = Signature(CallKind.decode_dispatch, fields)
        if levels is not None:
            return NodeDispatch(levels, signature, payload, topk_idx, request)
        token, counts = cpu_routing.destinations(topk_idx, shape.num_experts, self._exchange.num_ranks)
        tokens = torch.split(token, counts.tolist())
        return DirectDispatch(self._exchange, signature, payload, tokens, hooked=request.return_hook)

    def _finish(
        self,
        phase: str,
        under_way: PendingDispatch | PendingCombine,
        receive: Callable[[Deadline], None],
        *,
        return_hook: bool,
    ) -> Callable[[], None]:
        """Run the second half of a call now, inside of the call, or return a hook that runs it once."""
        exchange, done = self._exchange, False

        @without_autocast
        def finish() -> None:
            nonlocal done
            deadline = Deadline(exchange.timeout_s)
            with exchange.guard(phase):
                exchange.catch_up(deadline)
                try:
                    receive(deadline)
                except CapacityError:  # the rows are gone
                    done = True
                    raise
                done = True

        @not_compiled
        def hook() -> None:
            if done or under_way.aborted:
                return
            before = exchange.entrance.latest
            try:
                with exchange.entrance.alone(phase), torch.inference_mode():
                    finish()
            except BaseException as error:
                exchange.interrupted(phase, before, error)
                raise

        if return_hook:
            return hook
        with torch.inference_mode():  # results, `out` and counters may come from it, and be filled outside of it
            finish()
        return no_hook


def _arrange(
    result: DecodeDispatched[Tensor | Quantized],
    payload: Payload,
    received: Sequence[ReceivedRows],
    allocator: Allocator,
    *,
    first: int,
) -> None:
    """Fill the result of a decode dispatch with received rows; ``first`` is the first local expert."""
    plan = result.plan
    num_local, capacity = plan.src_token.shape
    metadata = payload.gather_metadata(received)
    local_idx = cpu_routing.to_local(metadata["topk_idx"], first, num_local)
    assigned = cpu_routing.assign(local_idx, num_local, 1, capacity)
    row_idx = assigned.row_idx
    row, slot = (row_idx >= 0).nonzero().unbind(1)
    expert, column = row_idx[row, slot] // capacity, row_idx[row, slot] % capacity

    target = result.x.data if isinstance(result.x, Quantized) else result.x
    ranges = [range(i * capacity, i * capacity + count) for i, count in enumerate(assigned.counts.tolist())]
    rows = payload.gather_rows(received, allocator)
    cpu_routing.expand_rows(rows, row_idx, ranges, target.view(-1, target.shape[-1]))
    if isinstance(result.x, Quantized):
        result.x.scale[expert, column] = metadata["scale"][row]
    if plan.row_weights is not None:
        weights = cpu_routing.scatter_weights(metadata["weights"], row_idx, num_local * capacity)
        plan.row_weights.copy_(weights.view(num_local, capacity))
    plan.src_token[expert, column] = metadata["token"][row, 0].int()
    result.expert_counts.copy_(assigned.counts)

    num_rows = torch.tensor([source.num_rows for source in received], dtype=torch.int64, device="cpu")
    src = torch.repeat_interleave(torch.arange(len(received), dtype=torch.int64, device="cpu"), num_rows)
    hits = cpu_routing.hits(local_idx, 1, num_local).long()
    counts = torch.zeros(len(received), num_local, dtype=torch.int64, device="cpu").index_add_(0, src, hits).T
    plan.src_range.copy_(packed_ranges(counts))


def _empty_like(rows: Tensor | Quantized, num_local: int, num_rows: int, allocator: Allocator) -> Tensor | Quantized:
    """Return undefined rows of a result; scales are column-major, so that a grouped FP8 GEMM can load them by TMA."""
    if not isinstance(rows, Quantized):
        return allocator.empty(num_local, num_rows, rows.shape[1], dtype=rows.dtype)
    data = allocator.empty(num_local, num_rows, rows.data.shape[1], dtype=rows.data.dtype)
    scale = allocator.empty(num_local, rows.scale.shape[1], num_rows, dtype=rows.scale.dtype)
    return Quantized(data, scale.transpose(1, 2))
