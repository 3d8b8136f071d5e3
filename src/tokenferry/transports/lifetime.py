"""The end of a peer's process, as a descriptor that can be polled (Linux).

A connection shows the end of a process only when every copy of its other end is closed. Children inherit the sockets of
gloo; and a child that C code has forked keeps a copy of ours too, since it runs no hook of Python that closes them
(`tokenferry.forked`). A pidfd refers to the process alone.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping

from tokenferry.forked import forget_in_child

_CREDENTIALS = struct.Struct("iII")
"""The process, the user and the group at the other end of a connection, as Linux returns them."""
_GRACE_S = 0.8
"""What a process sent before it ended may take this long to arrive, on a busy machine."""
_CHECK_MS = 100


class Connection(socket.socket):
    """A socket that goes with its last reference, and without a ResourceWarning: a group need not be closed."""

    def __del__(self) -> None:
        self.close()


def open_process(pid: int) -> int:
    """Return a descriptor that is readable once a process has ended.

    Returns:
        int: -1 if there is none: not Linux, an old kernel, a process of another container, no descriptors left. Then
        connections alone show the end of the process.
    """
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1


def open_peer(connection: socket.socket) -> int:
    """Return such a descriptor for the process at the other end of a Unix socket, or -1."""
    try:
        peer = process_and_user(connection)
    except OSError:
        return -1
    return -1 if peer is None else open_process(peer[0])


def process_and_user(connection: socket.socket) -> tuple[int, int] | None:
    """Return the process and the user at the other end of a Unix socket; None where that cannot be asked.

    Raises:
        OSError: the system refuses to say.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(found)
    return process, user


class Watch:
    """Ends waits for peers whose process has ended: a thread that polls their descriptors, and sleeps otherwise.

    Args:
        processes: For some peers a descriptor of `open_process`, which is closed with this object.
        give_up: Makes the wait for a peer fail that is running in another thread; must not refer to this object.
    """

    def __init__(self, processes: Mapping[int, int], give_up: Callable[[int], object]) -> None:
        self._wake = -1
        self._state = state = _State(processes, give_up)
        if not state.processes:
            return
        try:
            wake, self._wake = os.pipe()
            state.descriptors.append(wake)
            threading.Thread(target=_watch, args=(state, wake), name="tokenferry-watch", daemon=True).start()
        except (OSError, RuntimeError):  # no descriptors or no thread: then a wait ends at its deadline
            self._forget()
        forget_in_child(self, Watch._forget)

    @contextlib.contextmanager
    def waiting(self, peer: int, others: Collection[int] = ()) -> Iterator[None]:
        """Watch the process of a peer while the block waits for it, and those of others that will be waited for."""
        state = self._state
        state.since, state.peer = time.monotonic(), peer
        state.awaited = frozenset((peer, *others))
        try:
            yield
        finally:
            state.awaited = frozenset()

    def ended(self, peer: int) -> bool:
        """Return whether the process of a peer has ended."""
        return peer in self._state.ended

    def close(self, write: Callable[[int, bytes], int] = os.write, close: Callable[[int], None] = os.close) -> None:
        """End the thread, which closes the descriptors; idempotent."""
        # It ends a little later, maybe while the interpreter exits: torch aborts if a process group is freed there.
        self._state.give_up = None
        wake, self._wake = self._wake, -1
        if wake >= 0:
            write(wake, b"x")  # arguments, since `os` may be gone at interpreter exit
            close(wake)

    __del__ = close

    def _forget(self, _reason: str = "") -> None:
        """Close the descriptors where there is no thread, as in a forked child."""
        wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)
        self._state.close()


class _State:
    """What a `Watch` and its thread share.

    Attributes:
        processes: Peers by descriptor.
        descriptors: All descriptors that are still open.
        give_up: See `Watch`; None once that is closed.
        ended: Peers whose process has ended.
        peer: The peer that is waited for.
        awaited: This peer, and others that have to send something, too; empty if nothing is waited for.
        since: The time at which that wait began.
    """

    def __init__(self, processes: Mapping[int, int], give_up: Callable[[int], object]) -> None:
        self.processes = {fd: peer for peer, fd in processes.items() if fd >= 0}
        self.descriptors = list(self.processes)
        self.give_up: Callable[[int], object] | None = give_up
        self.ended: set[int] = set()
        self.peer = -1
        self.awaited: frozenset[int] = frozenset()
        self.since = 0.0

    def close(self) -> None:
        """Close all descriptors; idempotent."""
        while self.descriptors:
            os.close(self.descriptors.pop())


def _watch(state: _State, wake: int) -> None:
    poll = select.poll()
    for fd in state.descriptors:
        poll.register(fd, select.POLLIN)
    while True:
        for fd, _ in poll.poll(_CHECK_MS if state.ended else None):
            if fd == wake:
                state.close()
                return
            poll.unregister(fd)
            state.ended.add(state.processes[fd])
            state.since = max(state.since, time.monotonic())
        give_up = state.give_up
        if give_up is not None and state.awaited & state.ended and time.monotonic() - state.since > _GRACE_S:
            give_up(state.peer)
        del give_up
