"""Deliveries of the CUDA backend: blocks for rows to land in, kernels that bring them, tensors over what has come."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenferry.backends.cuda import launch
from tokenferry.backends.cuda import plan as cuda_plan
from tokenferry.backends.cuda.buffers import SymmetricAllocator, ends
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.launch import Delivered, Payload, RecvOffsets, Tables
from tokenferry.backends.cuda.plan import Counts, Geometry
from tokenferry.errors import TokenferryError
from tokenferry.kernels.codes import MASKED
from tokenferry.memory.heap import Block
from tokenferry.types import Dispatched, Layout, Plan, Quantized

Sms = tuple[int, int]
"""SMs of what uses the links, and of what is local."""
_Parts = tuple[Block, Block, tuple[int, ...], tuple[int, ...], bool]
"""Block of rows, block of the plan, starts of rows, scales and weights, ends of ids and src_token, whether staged."""


class Dispatcher:
    """Where one rank's rows land.

    Args:
        context: This rank's.
        allocator: Where blocks come from.
        key: Of the group, for plans.
    """

    def __init__(self, context: Context, allocator: SymmetricAllocator, key: str) -> None:
        self._context = context
        self._allocator = allocator
        self._key = key
        self._no_row_idx: dict[int, Tensor] = {}

    def along(self, call: Call, payload: Payload, plan: Plan, sms: Sms) -> Dispatched:
        """Move rows along a plan, and unpack them."""
        options = plan.options
        K, L = plan.topk_idx.shape[1], plan.expert_counts.shape[0]
        D = plan.num_delivered
        rows_end, scale_end, end = _data_ends(payload, D, 1 if options.layout is not Layout.ROWS else K)
        block, staged = self._allocator.recv_block(call, end)
        recv = RecvOffsets(block.offset, block.offset + rows_end, block.offset + scale_end)
        route = (plan.places, plan.dst_counts, plan.src_counts)
        by_expert = options.layout is not Layout.ROWS
        launch.move(self._context, call, payload, route, (K, L, by_expert), recv, sms[0])
        if by_expert:
            self._unpack(call, payload, recv, plan, (plan.row_idx.data_ptr(), D), sms[1])
        offsets, host_counts = None, plan.host_counts
        if options.layout is Layout.EXPERTS:
            padded = (plan.expert_counts + options.alignment - 1) // options.alignment * options.alignment
            offsets = torch.nn.functional.pad(padded.cumsum(0), (1, 0)).int()
        if host_counts is None and options.counts == "host":
            host_counts = tuple(plan.expert_counts.tolist())
        return self._dispatched(block, payload, plan, (0, rows_end, scale_end), (offsets, host_counts, staged))

    def first(self, call: Call, payload: Payload, found: Geometry, sms: Sms) -> Dispatched:
        """Make a plan and move rows along it; they bring the peers' half of the plan, too.

        Where the heap has room for the worst case, rows move at once, and the host learns their number meanwhile. Else
        it waits for the counts first, and takes what they need.
        """
        index, options, context = payload.topk_idx, found.options, self._context
        assert index is not None
        num_tokens = index.shape[0]
        counts = cuda_plan.at_most(found, num_tokens)
        asks = options.counts == "host"
        waits = asks and not self._allocator.has_room_twice(_worst_bytes(payload, found))
        parts = None if waits else self._take(call, payload, found, counts)  # nothing is sent yet if this fails
        tables = cuda_plan.start(context, call, index, found, sms[0])
        if waits or (found.space.tight and not call.capturing):
            with context.breaking_off(TokenferryError):  # those that `wait` raises are dealt with there
                exact = cuda_plan.wait(context, call, found)
            counts = exact if asks else counts
        with context.breaking_off():  # peers wait for this rank's rows by now
            parts = parts or self._take(call, payload, found, counts)
            self._move_first(call, payload, found, (tables, counts, parts), sms)
        if asks and counts.host is None:
            counts = cuda_plan.wait(context, call, found)
        return self._first_dispatched(payload, found, tables, counts, parts)

    def _take(self, call: Call, payload: Payload, found: Geometry, counts: Counts) -> _Parts:
        """Blocks for what comes.

        Raises:
            CapacityError: the heap is full.
        """
        index = payload.topk_idx
        assert index is not None
        N, K, by_expert = counts.received, index.shape[1], found.by_expert
        ids_end, token_end, end = ends(N * K * index.element_size(), N * 8, N * K * 8 if by_expert else 0)
        small = self._allocator.room(call, end)
        # Rows last: where N turns out smaller, what is behind them goes back.
        D = counts.delivered
        weights_end, scale_end, end = ends(
            0 if payload.weights is None else D * 4 * (1 if by_expert else K),
            D * payload.scale_bytes,
            D * payload.row_bytes,
        )
        block, staged = self._allocator.recv_block(call, end)
        return block, small, (scale_end, weights_end, 0), (ids_end, token_end), staged

    def _move_first(
        self, call: Call, payload: Payload, found: Geometry, planned: tuple[Tables, Counts, _Parts], sms: Sms
    ) -> None:
        """Launch what brings the rows, and the peers' half of the plan."""
        tables, counts, (block, small, starts, (ids_end, token_end), _) = planned
        index = payload.topk_idx
        assert index is not None
        K, by_expert = index.shape[1], found.by_expert
        recv = RecvOffsets(
            block.offset + starts[0],
            block.offset + starts[1],
            block.offset + starts[2],
            small.offset,
            small.offset + ids_end,
            small.offset + token_end,
        )
        route = (tables.places, tables.dst_counts, tables.src_counts)
        launch.move(self._context, call, payload, route, (K, found.num_local, by_expert), recv, sms[0])
        if by_expert:
            exact = found.options.counts == "host" and found.layout != MASKED
            rows = (small.address + token_end, 0 if exact else counts.delivered)
            self._unpack(call, payload, recv, (tables, found), rows, sms[1])

    def _unpack(
        self,
        call: Call,
        payload: Payload,
        recv: RecvOffsets,
        plan: Plan | tuple[Tables, Geometry],
        rows: tuple[int, int],
        num_sms: int,
    ) -> None:
        """Launch `unpack` for rows that have landed; ``rows``: address of row_idx, rows in all (0: see `Delivered`)."""
        base = self._context.window.base
        if isinstance(plan, Plan):
            options, K = plan.options, plan.topk_idx.shape[1]
            src_counts, expert_counts = plan.src_counts, plan.expert_counts
            masked = options.layout is Layout.MASKED
            capacity = plan.num_delivered // expert_counts.shape[0] if masked else 0
        else:
            tables, found = plan
            assert payload.topk_idx is not None
            options, K, capacity = found.options, payload.topk_idx.shape[1], found.masked_capacity
            src_counts, expert_counts = tables.src_counts, tables.expert_counts
        delivered = Delivered(
            base + recv.rows,
            base + recv.scale if payload.scale_bytes else 0,
            0 if payload.weights is None else base + recv.weights,
            rows[1],
            payload.row_bytes,
            payload.scale_bytes,
            options.alignment,
            capacity,
            options.zero_padding,
        )
        launch.unpack(self._context, call, delivered, (rows[0], K, src_counts, expert_counts), num_sms)

    def _first_dispatched(
        self, payload: Payload, found: Geometry, tables: Tables, counts: Counts, parts: _Parts
    ) -> Dispatched:
        """Wrap a first delivery, and give back what the worst case took too much."""
        block, small, starts, (ids_end, token_end), staged = parts
        index = payload.topk_idx
        assert index is not None
        N, K, allocator = counts.received, index.shape[1], self._allocator
        dst_token, row_idx = tables.dst_token, self._no_row_idx.get(K)
        if counts.host is not None:  # else there is as much as there was room for
            small.trim(token_end + (N * K * 8 if found.by_expert else 0))
            block.trim(starts[0] + counts.delivered * payload.row_bytes)
            dst_token = dst_token[: counts.sent]
        if found.by_expert:
            row_idx = allocator.tensor(small, token_end, (N, K), torch.int64)
        elif row_idx is None:
            row_idx = self._no_rows(K)
        plan = Plan(
            self._key,
            found.options,
            index.shape[0],
            N if found.options.counts == "host" else None,
            counts.delivered,
            dst_token,
            tables.dst_counts,
            allocator.tensor(small, ids_end, (N,), torch.int64),
            tables.src_counts,
            allocator.tensor(small, 0, (N, K), index.dtype),
            row_idx,
            tables.expert_counts,
            tables.places,
            counts.host,
        )
        return self._dispatched(block, payload, plan, starts, (tables.expert_offsets, counts.host, staged))

    def _no_rows(self, top_k: int) -> Tensor:
        """What `Plan.row_idx` is for ROWS: there is nothing in it, so that all plans share it."""
        with torch.inference_mode(False):  # else no plan with it could be saved for a backward
            made = torch.empty(0, top_k, dtype=torch.int64, device=self._context.device)
        self._no_row_idx[top_k] = made
        return made

    def _dispatched(
        self,
        block: Block,
        payload: Payload,
        plan: Plan,
        starts: tuple[int, ...],
        more: tuple[Tensor | None, tuple[int, ...] | None, bool],
    ) -> Dispatched:
        """Tensors over what landed in a block; ``starts`` of rows, scales, weights."""
        offsets, host_counts, staged = more
        D, allocator, by_rows = plan.num_delivered, self._allocator, plan.options.layout is Layout.ROWS
        rows = allocator.tensor(block, starts[0], (D, payload.rows.shape[1]), payload.rows.dtype)
        scale = weights = None
        if payload.scale is not None:
            scale = allocator.tensor(block, starts[1], (D, payload.scale.shape[1]), payload.scale.dtype)
        if payload.weights is not None:
            shape = (D, payload.weights.shape[1]) if by_rows else (D,)
            weights = allocator.tensor(block, starts[2], shape, torch.float32)
        if staged:
            rows, scale, weights = rows.clone(), _clone(scale), _clone(weights)
        if plan.options.layout is Layout.MASKED:
            rows = shaped(rows, plan)
            scale = None if scale is None else shaped(scale, plan)
            weights = None if weights is None else shaped(weights, plan)
        return Dispatched(
            rows if scale is None else Quantized(rows, scale),
            plan.topk_idx if by_rows else None,
            weights,
            plan.expert_counts,
            offsets,
            host_counts,
            plan,
        )


def _data_ends(payload: Payload, num_rows: int, weights_of_row: int) -> tuple[int, ...]:
    """Ends of rows, scales and weights in a block."""
    weights_bytes = 0 if payload.weights is None else num_rows * 4 * weights_of_row
    return ends(num_rows * payload.row_bytes, num_rows * payload.scale_bytes, weights_bytes)


def _worst_bytes(payload: Payload, found: Geometry) -> int:
    """What a delivery needs if its room is full."""
    row = payload.row_bytes + payload.scale_bytes + (0 if payload.weights is None else 4 * payload.weights.shape[1])
    index = payload.topk_idx
    assert index is not None
    plan = 8 + index.shape[1] * (index.element_size() + (8 if found.by_expert else 0))
    return found.most_delivered * row + found.space.received * plan


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def shaped(tensor: Tensor, plan: Plan) -> Tensor:
    """``[rows, ...]`` in the shape of the layout."""
    if plan.options.layout is not Layout.MASKED:
        return tensor
    num_local = plan.expert_counts.numel()
    return tensor.view(num_local, plan.num_delivered // num_local, *tensor.shape[1:])
