"""Where rows of the CUDA backend lie: blocks of the heap, tensors over them, and what is copied into or out of them."""

from __future__ import annotations

import functools
import itertools
import logging

import torch
from torch import Tensor

from tokenferry.backends.cuda import launch
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.errors import CapacityError
from tokenferry.memory.heap import Block, HeapFull
from tokenferry.memory.tensor import tensor_at
from tokenferry.types import Layout, Plan

_log = logging.getLogger("tokenferry")
_SECTION = 128
"""Sections of a block begin at multiples of this."""


class SymmetricAllocator:
    """Blocks of one rank's heap for rows that peers write or read."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._heap = context.heap
        self._base = context.window.base
        self._end = context.window.base + context.window.num_bytes
        self._warned = False

    def block(self, phase: str, num_bytes: int, stream: int, capture: int | None = None) -> Block:
        """A block of the heap; ``capture``: see `Heap.block`.

        Raises:
            CapacityError: the heap has no room; gives the numbers and the setting.
        """
        try:
            return self._heap.block(num_bytes or 1, stream, capture)
        except HeapFull as full:
            raise CapacityError(f"{phase}: {full}") from None

    def has_room_twice(self, num_bytes: int) -> bool:
        """Whether two blocks of this size are likely to be had."""
        return self._heap.has_room(2 * num_bytes)

    def recv_block(self, call: Call, num_bytes: int) -> tuple[Block, bool]:
        """A block for rows to land in, and whether they have to leave it at once.

        The last room of the heap is for landing only: a result that stayed there would let nobody else land.
        """
        heap, block = self._heap, self.room(call, num_bytes)
        staged = not call.capturing and not heap.has_room(num_bytes)
        if staged and not self._warned:
            self._warned = True
            _log.warning(
                "%s: the heap (%.0f MiB, %.0f MiB free) has no room for another result of %.1f MiB: from now on "
                "results are copied out of it where that is so; set TOKENFERRY_HEAP_MB higher, or let go of earlier "
                "results",
                call.signature.phase,
                heap.num_bytes / 2**20,
                heap.free_bytes / 2**20,
                num_bytes / 2**20,
            )
        return block, staged

    def rows(self, phase: str, shape: tuple[int, int], dtype: torch.dtype, stream: int) -> tuple[Block, Tensor]:
        """Undefined rows in a block of the heap."""
        block = self.block(phase, shape[0] * shape[1] * dtype.itemsize, stream)
        return block, self.tensor(block, 0, shape, dtype)

    def tensor(self, block: Block, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A part of a block as a tensor, which keeps the block alive."""
        return tensor_at(block.address + start, shape, dtype, self._context.device, block)

    def offset(self, tensor: Tensor) -> int:
        """Where in the window a tensor lies that peers can reach; 0: they cannot."""
        pointer = tensor.data_ptr()
        end = pointer + tensor.numel() * tensor.element_size()
        return pointer - self._base if self._base <= pointer and end <= self._end and pointer % 16 == 0 else 0

    def room(self, call: Call, num_bytes: int) -> Block:
        """A block that a call needs while it runs."""
        return self.block(call.signature.phase, num_bytes, call.stream, None if call.capturing else 0)

    def reachable(self, call: Call, tensor: Tensor) -> tuple[int, Block | None]:
        """Where peers find a tensor: its offset in the window; it is copied into a block if it lies elsewhere."""
        offset = self.offset(tensor)
        if offset:
            return offset, None
        block = self.room(call, tensor.numel() * tensor.element_size())
        if tensor.numel():
            self.tensor(block, 0, tuple(tensor.shape), tensor.dtype).copy_(tensor)
        return block.offset, block

    def share(self, call: Call, y: Tensor, plan: Plan, num_sms: int) -> tuple[int, Block | None]:
        """The same for a plan's rows by expert; of MASKED only those below the counts are copied."""
        if plan.options.layout is Layout.EXPERTS or self.offset(y):
            return self.reachable(call, y)
        block = self.room(call, y.numel() * y.element_size())
        y = aligned(y)
        if y.numel():
            launch.stage(self._context, call, y, block.address, plan, num_sms)
        return block.offset, block


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that begins at a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in the same memory, or may."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@functools.lru_cache(maxsize=256)
def ends(*sizes: int) -> tuple[int, ...]:
    """Where sections of these sizes end, each at a multiple of 128."""
    return tuple(itertools.accumulate(-(-size // _SECTION) * _SECTION for size in sizes))
