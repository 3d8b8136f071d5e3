"""The processes of a group's other ranks: a thread notes when one ends, so that kernels do not wait for its messages.

A rank is watched by a file descriptor of its process (a *pidfd*), which becomes readable when the process has ended,
whatever ended it, and whatever children it has forked. The thread sleeps until then. It calls nothing of CUDA, because
another thread may be capturing a CUDA graph: it stores a bit in pinned memory, which kernels read when they have waited
for long (kernels/device/sync.cuh).
"""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenferry.transports.handshake import pid_namespace

_log = logging.getLogger("tokenferry")


@dataclass(frozen=True, slots=True)
class Process:
    """A process, as the ranks of its host know it.

    Attributes:
        pid: Its id in its namespace.
        namespace: The name of that namespace.
    """

    pid: int
    namespace: str

    @classmethod
    def this(cls) -> Process:
        """Return this process."""
        return cls(os.getpid(), pid_namespace())


class Peers:
    """The processes of all ranks but this one. Local.

    Args:
        processes: The process of each rank. They must live until `watch` is called; a handshake that comes from each
            after this object was made shows that. A rank in this process, as in tests, is not watched.
    """

    def __init__(self, processes: Sequence[Process] = ()) -> None:
        self._pid = os.getpid()
        self._ranks: dict[int, int] = {}  # by descriptor
        self._wake = -1
        self._watching = False
        try:
            self._open(processes)
        except OSError as error:
            self._do_without(error)

    def watch(self, ended: memoryview) -> None:
        """Set bit r of ``ended[0]`` when the process of rank r ends, from now on until `close`."""
        if self._wake < 0:
            return
        args = (self._ranks, self._wake, ended)  # not this object: it must be able to die
        try:
            threading.Thread(target=_watch, args=args, name="tokenferry-peers", daemon=True).start()
            self._watching = True
        except RuntimeError as error:  # no more threads
            self._do_without(error)

    def close(self) -> None:
        """Stop watching. Idempotent."""
        if os.getpid() != self._pid or not self._watching:  # in a forked child there is no thread
            self._close_descriptors()
            return
        self._watching = False
        wake, self._wake, self._ranks = self._wake, -1, {}
        os.eventfd_write(wake, 1)  # the thread closes all descriptors

    def _open(self, processes: Sequence[Process]) -> None:
        mine = Process.this()
        others = {rank: process for rank, process in enumerate(processes) if process != mine}
        if not others:
            return
        if not hasattr(os, "pidfd_open"):
            raise OSError("this system has no pidfd_open")
        for rank, process in others.items():
            if process.namespace != mine.namespace:
                raise OSError(f"rank {rank} is in another PID namespace")
            self._ranks[os.pidfd_open(process.pid)] = rank
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)

    def _do_without(self, error: Exception) -> None:
        self._close_descriptors()
        _log.warning(
            "cannot watch the processes of other ranks (%s): calls notice after timeout_s that one has ended; lower "
            "it if that is too late, or allow what was refused",
            error,
        )

    def _close_descriptors(self) -> None:
        descriptors = [*self._ranks, *([self._wake] if self._wake >= 0 else [])]
        self._ranks, self._wake = {}, -1
        for descriptor in descriptors:
            os.close(descriptor)

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:  # bound: `sys` may be gone
        if not finalizing():
            self.close()


def _watch(ranks: dict[int, int], wake: int, ended: memoryview) -> None:
    """Wait for the ends of processes, by descriptor, until ``wake`` is readable; then close all descriptors."""
    poll = select.poll()
    for descriptor in (wake, *ranks):
        poll.register(descriptor, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == wake:
                for each in (wake, *ranks):
                    os.close(each)
                return
            ended[0] |= 1 << ranks[descriptor]
            poll.unregister(descriptor)
