"""Symmetric memory of the CUDA backend: blocks of the heap, tensors over them, and copies for peers to read."""

from __future__ import annotations

import functools
import itertools
import logging

import torch
from torch import Tensor

from tokenferry.ambient import not_compiled
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.errors import CapacityError
from tokenferry.memory.heap import Block, HeapFull
from tokenferry.memory.tensor import tensor_at

_log = logging.getLogger("tokenferry")
_SECTION = 128
"""Sections of a block begin at multiples of this."""


class SymmetricAllocator:
    """Blocks of one rank's heap, for rows that peers write or read."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._heap = context.heap
        self._base = context.window.base
        self._end = context.window.base + context.window.num_bytes
        self._reserve = 0
        self._warned = False
        not_compiled(Block.__del__)  # runs wherever a program drops a result

    def expect(self, num_bytes: int) -> None:
        """Note how large the results of dispatches may become: so much stays free, if it is not most of the heap."""
        self._reserve = max(self._reserve, min(num_bytes, self._heap.num_bytes * 3 // 4))

    def expect_more(self, num_bytes: int) -> None:
        """Note how large a result was, where no M says how large others may become; the estimate is twice as much."""
        self.expect(2 * num_bytes)

    def block(self, phase: str, num_bytes: int, stream: int, capture: int | None = None) -> Block:
        """Return a block of the heap; ``capture``: see `Heap.block`.

        Raises:
            CapacityError: the heap has no room; gives the numbers and the setting.
        """
        try:
            return self._heap.block(num_bytes or 1, stream, capture)
        except HeapFull as full:
            raise CapacityError(f"{phase}: {full}") from None

    def call_block(self, call: Call, num_bytes: int) -> Block:
        """Return a block for a call, on its stream.

        Raises:
            CapacityError: as `block`.
        """
        try:
            return self._heap.block(num_bytes or 1, call.stream, None if call.capturing else 0)
        except HeapFull as full:
            raise CapacityError(f"{call.signature.phase}: {full}") from None

    def require(self, call: Call, num_bytes: int) -> None:
        """Check that a block can be had now.

        Raises:
            CapacityError: as `block`.
        """
        if not self._heap.has_room(num_bytes):
            self.call_block(call, num_bytes)

    def recv_block(self, call: Call, num_bytes: int) -> tuple[Block, bool]:
        """Return a block for received rows, and whether they have to be copied out of it at once.

        The last free part of the heap is for rows under way only: results that stayed there would leave no space for
        the rows of a later call, which may be as many as `expect` has noted.

        Raises:
            CapacityError: as `block`.
        """
        heap, block = self._heap, self.call_block(call, num_bytes)
        room = max(num_bytes, self._reserve)
        copy_out = not call.capturing and not heap.has_room(room)
        if copy_out and not self._warned:
            self._warned = True
            _log.warning(
                "%s: the heap (%.0f MiB, %.0f MiB free, the largest free range %.1f MiB) keeps a range of %.1f MiB for "
                "rows under way, so a result of %.1f MiB is copied out of it, as later ones will be where that is so; "
                "set TOKENFERRY_HEAP_MB higher, or release earlier results",
                call.signature.phase,
                heap.num_bytes / 2**20,
                heap.free_bytes / 2**20,
                heap.largest_free / 2**20,
                room / 2**20,
                num_bytes / 2**20,
            )
        return block, copy_out

    def has_room_for_two(self, num_bytes: int) -> bool:
        """Return whether the heap is likely to have two blocks of this size."""
        return self._heap.has_room(2 * num_bytes)

    def new_rows(self, phase: str, shape: tuple[int, int], dtype: torch.dtype, stream: int) -> Tensor:
        """Return undefined rows in a block of the heap.

        Raises:
            CapacityError: as `block`.
        """
        block = self.block(phase, shape[0] * shape[1] * dtype.itemsize, stream)
        return self.tensor(block, block.offset, shape, dtype)

    def tensor(self, block: Block, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor over a part of a block, which it keeps alive; ``offset`` is one in the window."""
        return tensor_at(self._base + offset, shape, dtype, self._context.device, block)

    def offset(self, tensor: Tensor) -> int:
        """Return the offset of a tensor in the window, where peers can read it; 0 if it is not there."""
        pointer = tensor.data_ptr()
        end = pointer + tensor.numel() * tensor.element_size()
        return pointer - self._base if self._base <= pointer and end <= self._end and pointer % 16 == 0 else 0

    def in_window(self, call: Call, tensor: Tensor) -> tuple[int, Block | None]:
        """Return the offset of a tensor in the window, or of a copy in a block, which is returned, too.

        Raises:
            CapacityError: as `block`.
        """
        offset = self.offset(tensor)
        if offset:
            return offset, None
        block = self.call_block(call, tensor.numel() * tensor.element_size())
        if tensor.numel():
            self.tensor(block, block.offset, tuple(tensor.shape), tensor.dtype).copy_(tensor)
        return block.offset, block


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy that begins at a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@functools.lru_cache(maxsize=256)
def section_ends(*sizes: int) -> tuple[int, ...]:
    """Return where sections of these sizes end, each at a multiple of 128."""
    return tuple(itertools.accumulate(-(-size // _SECTION) * _SECTION for size in sizes))
