"""Segments: anonymous memory that one rank writes and its peers on the same host map. No name, no file left behind.

A segment belongs to the rank that made it. Peers receive its file descriptor over a Unix socket, so nothing has to be
found by path, nothing outlives the processes, and the limit of /dev/shm does not apply.
"""

from __future__ import annotations

import mmap
import os
import tempfile
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

    def __del__(self) -> None:
        os.close(self.fd)


def create(number: int, num_bytes: int) -> Segment:
    """Make a segment of at least ``num_bytes``, and up to an eighth more so that it fits later calls too.

    Raises:
        OSError: the memory is not to be had; raised here, not by a signal when it is first written.
    """
    unit = max(_PAGE, 1 << max(num_bytes.bit_length() - 4, 0))
    size = -(-num_bytes // unit) * unit
    fd = _anonymous_file()
    os.ftruncate(fd, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
    return Segment(number, fd, attach(fd, size))


def attach(fd: int, size: int) -> Tensor:
    """Map a segment as a uint8 tensor; the mapping lives as long as the tensor."""
    return torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tokenferry", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # macOS: already unlinked, lives as long as a descriptor does
        return os.dup(file.fileno())
