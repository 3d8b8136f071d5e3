"""Memory for results that is used again when they die.

The first touch of new memory costs several times the copy that touches it, and results of a call are as large as its
messages. So large results lie in blocks of the allocator; a block comes back when the last tensor that uses it is
gone, and the next result that fits takes it over. Tensors are ordinary; they may outlive the group.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import torch
from torch import Tensor

_LARGE_BYTES = 1 << 18
"""Below this the C library's allocator keeps the memory by itself."""
_KEPT_BLOCKS = 12
"""A dispatch and a combine by turns need up to eight; of what is freed beyond this, the oldest goes to the system."""


class Allocator:
    """Makes tensors in reusable memory; one per group."""

    def __init__(self) -> None:
        self._free: deque[mmap.mmap] = deque(maxlen=_KEPT_BLOCKS)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor whose content is undefined, like `torch.empty`."""
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        if num_bytes < _LARGE_BYTES:
            return torch.empty(*shape, dtype=dtype)
        block = self._take(num_bytes)
        view = memoryview(block)
        # The tensor's storage holds the view, and nothing else does.
        weakref.finalize(view, self._free.append, block).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8, count=num_bytes).view(dtype).view(*shape)

    def _take(self, num_bytes: int) -> mmap.mmap:
        """The smallest free block that fits and is not twice too large, or a new one."""
        fitting = [block for block in list(self._free) if num_bytes <= len(block) <= 2 * num_bytes]
        for block in sorted(fitting, key=len):
            try:
                self._free.remove(block)
            except ValueError:  # a result died in another thread, and this block was dropped for its
                continue
            return block
        unit = max(_LARGE_BYTES, 1 << (num_bytes.bit_length() - 4))
        size = -(-num_bytes // unit) * unit
        # Private: a forked process shall not write into results of this one.
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
