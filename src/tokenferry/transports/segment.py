"""Segments: anonymous memory that one rank writes and its peers on the same host map. No name, no file left behind.

A segment belongs to the rank that made it. Peers receive its file descriptor over a Unix socket, so nothing has to be
found by path, nothing outlives the processes, and the limit of /dev/shm does not apply.
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
        number: Its number on this rank, counted from 1.
        fd: File descriptor that peers receive.
        memory: ``[size]`` uint8, shared.
        known: Peers that have the descriptor already.
        call: The call whose messages it holds.
        readers: Ranks that may still read them.
    """

    number: int
    fd: int
    memory: Tensor
    known: set[int] = field(default_factory=set)
    call: int = 0
    readers: frozenset[int] = frozenset()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: at interpreter exit `os` may be gone
        close(self.fd)


def create(number: int, num_bytes: int) -> Segment:
    """Make a segment of at least ``num_bytes``, and up to an eighth more so that it fits later calls too.

    Raises:
        MemoryError: it is not to be had.
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
            f"{size} bytes of shared memory are not to be had ({error}); send fewer tokens at once, or use "
            "transport='process_group'"
        ) from error


def attach(fd: int, size: int) -> Tensor:
    """Map a segment as a uint8 tensor; the mapping lives as long as the tensor."""
    return torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("tokenferry", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return fd
    with tempfile.TemporaryFile() as file:  # macOS: already unlinked, lives as long as a descriptor does
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):  # a full disk shall be an exception here, not a signal at some later write
            os.posix_fallocate(file.fileno(), 0, size)
        return os.dup(file.fileno())
