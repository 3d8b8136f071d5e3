"""Memory for results, reused when they are freed.

Touching new memory for the first time costs several times as much as copying to memory that was used before, and the
results of a call are as large as its messages. Large results therefore lie in blocks owned by the allocator: when the
last tensor that uses a block is freed, the next result that fits takes the block over. The tensors are ordinary ones
and may outlive the group.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import torch
from torch import Tensor

from tokenferry.ambient import not_compiled

_LARGE_BYTES = 1 << 18
"""Smaller results come from torch: the C library's allocator reuses their memory by itself."""
_KEPT_BLOCKS = 12
"""Free blocks to keep. A dispatch and a combine in turn need up to eight; the oldest beyond this are unmapped."""


class Allocator:
    """Allocates tensors in reusable memory; one per group."""

    def __init__(self) -> None:
        self._free: deque[mmap.mmap] = deque(maxlen=_KEPT_BLOCKS)
        self._closed = False

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor whose content is undefined, like `torch.empty`."""
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        if num_bytes < _LARGE_BYTES:
            return torch.empty(*shape, dtype=dtype, device="cpu")
        block = self._take(num_bytes)
        view = memoryview(block)
        # Only the tensor's storage refers to the view, so the block is free when the storage is.
        weakref.finalize(view, self._put_back, block).atexit = False
        storage = torch.frombuffer(view, dtype=torch.uint8, count=num_bytes).untyped_storage()
        # No view: hooks of autograd, such as those of FSDP, are lost when a view is changed in place.
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage).resize_(shape)

    def close(self) -> None:
        """Unmap the free blocks, and keep none from now on: the memory of a result is gone with its last tensor."""
        self._closed = True
        self._free.clear()

    @not_compiled  # runs wherever a program drops a result
    def _put_back(self, block: mmap.mmap) -> None:
        self._free.append(block)
        if self._closed:  # looked up last: another thread may have closed meanwhile
            self._free.clear()

    def _take(self, num_bytes: int) -> mmap.mmap:
        """Return the smallest free block that fits and is at most twice too large, or a new one."""
        fitting = [block for block in list(self._free) if num_bytes <= len(block) <= 2 * num_bytes]
        for block in sorted(fitting, key=len):
            try:
                self._free.remove(block)
            except ValueError:  # another thread freed a result, whose block pushed this one out
                continue
            return block
        unit = max(_LARGE_BYTES, 1 << (num_bytes.bit_length() - 4))
        size = -(-num_bytes // unit) * unit
        # Private, so that a forked process does not write into results of this one.
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
