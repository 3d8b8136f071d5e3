"""Segments: anonymous shared memory that one rank writes and its peers on the same host map.

A segment belongs to the rank that created it. Peers receive its file descriptor over a Unix socket. It therefore needs
no path, does not outlive the processes, and is not subject to the size limit of /dev/shm.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

_PAGE = 1 << 16


@dataclass(slots=True, eq=False)
class Segment:
    """A segment that this rank owns.

    Attributes:
        number: The number of the segment on this rank, counted from 1.
        fd: The file descriptor that peers receive.
        memory: ``[size]`` uint8, shared.
        known: Peers that already have the descriptor.
        call: Number of the call whose messages the segment holds.
        readers: The ranks that those messages are for.
    """

    number: int
    fd: int
    memory: Tensor
    known: set[int] = field(default_factory=set)
    call: int = 0
    readers: frozenset[int] = frozenset()

    def close(self, close: Callable[[int], None] = os.close) -> None:
        """Close the descriptor; idempotent. The memory exists as long as a tensor uses it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close(fd)  # an argument, since `os` may be gone at interpreter exit

    __del__ = close


def create(number: int, num_bytes: int) -> Segment:
    """Create a segment of at least ``num_bytes``, and up to an eighth more so that it fits later calls too.

    Raises:
        MemoryError: there is not enough shared memory.
    """
    unit = max(_PAGE, 1 << max(num_bytes.bit_length() - 4, 0))
    size = -(-num_bytes // unit) * unit
    fd = -1
    try:
        fd = _anonymous_file(size)
        return Segment(number, fd, attach(fd, size))
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise MemoryError(
            f"cannot allocate {size} bytes of shared memory ({error}); send fewer tokens at once, or use "
            "transport='process_group'"
        ) from error


def attach(fd: int, size: int) -> Tensor:
    """Map a segment as a uint8 tensor; the mapping exists as long as the tensor."""
    with torch.inference_mode(False):  # else no call outside of inference mode could write to it
        return torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("tokenferry", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return fd
    with tempfile.TemporaryFile() as file:  # macOS: already unlinked, exists as long as a descriptor
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):  # a full disk raises here, instead of a signal at a later write
            os.posix_fallocate(file.fileno(), 0, size)
        return os.dup(file.fileno())
