"""Segments: anonymous shared memory that one rank writes and its peers on the same host map.

A segment belongs to the rank that created it. Peers receive its file descriptor over a Unix socket. It therefore needs
no path, does not outlive the processes, and is not subject to the size limit of /dev/shm.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenferry.errors import ResourceError
from tokenferry.transports.refused import raise_if_refused, resource_error

_PAGE = 1 << 16
MAX_FDS = 64
"""Descriptors to receive at once."""


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
        fd, self.fd = getattr(self, "fd", -1), -1  # an interrupt may leave a half-made object
        if fd >= 0:
            close(fd)  # an argument, since `os` may be gone at interpreter exit

    __del__ = close


def create(number: int, num_bytes: int) -> Segment:
    """Create a segment of at least ``num_bytes``, and up to an eighth more so that it fits later calls too.

    Raises:
        ResourceError: shared memory, or what it takes, was refused.
    """
    unit = max(_PAGE, 1 << max(num_bytes.bit_length() - 4, 0))
    size = -(-num_bytes // unit) * unit
    fd = -1
    try:
        fd = _anonymous_file(size)
        return Segment(number, fd, attach(fd, size))
    except (OSError, MemoryError) as error:
        if fd >= 0:
            os.close(fd)
        raise_if_refused(f"cannot allocate {size} bytes of shared memory", error)
        raise


def attach(fd: int, size: int) -> Tensor:
    """Map a segment as a uint8 tensor; the mapping exists as long as the tensor."""
    with torch.inference_mode(False):  # else no call outside of inference mode could write to it
        return torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)


def receive(sock: socket.socket, num_bytes: int) -> tuple[bytes, list[int]]:
    """Receive bytes and the descriptors of segments that come along; as `socket.recv`.

    Raises:
        ResourceError: this process may not have the descriptors, which are lost.
    """
    data, fds, flags, _ = socket.recv_fds(sock, num_bytes, MAX_FDS)
    if flags & socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        try:
            raise _why_lost(sock)
        except OSError as error:
            raise_if_refused("cannot receive the descriptor of a peer's shared memory", error)
            raise
    return data, fds


def _why_lost(sock: socket.socket) -> OSError:
    """Return why the system has dropped a descriptor, which it does not say: there is space for none, or a rule."""
    try:
        os.close(os.dup(sock.fileno()))
    except OSError as error:
        return error
    return PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def why_not() -> str:
    """Return why this process cannot use segments, or an empty string, by trying all of it with a small one.

    One is created, mapped, sent over a Unix socket, received, and mapped once more.
    """
    if not hasattr(socket, "send_fds"):
        return "there are no Unix sockets that pass descriptors"
    try:
        made = create(1, 1)
        made.memory[0] = 7
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs:
            socket.send_fds(ours, [b"-"], [made.fd])
            _, fds = receive(theirs, 1)
        try:
            same = attach(fds[0], made.memory.numel())[0].item() == 7
        finally:
            os.close(fds[0])
        return "" if same else "memory that is passed to another process is not the same memory there"
    except (OSError, MemoryError, RuntimeError) as error:
        return str(
            error if isinstance(error, ResourceError) else resource_error("trying shared memory", error) or error
        )


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("tokenferry", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
        except OSError:
            os.close(fd)
            raise
        return fd
    with tempfile.TemporaryFile() as file:  # macOS: already unlinked, exists as long as a descriptor
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):  # a full disk raises here, instead of a signal at a later write
            os.posix_fallocate(file.fileno(), 0, size)
        return os.dup(file.fileno())
