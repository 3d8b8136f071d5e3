"""Forked children: what a process has made belongs to it, and its children leave it alone.

A child that is forked inherits copies of all objects, and every descriptor. If it used a group, its rows would reach
the peers in the name of its parent; and as long as it holds a socket of its parent, peers do not see that the parent
has ended. Each object that must not be used in a child registers here what a child does with it.

Python runs the hook of this module in every child that Python forks (`os.fork`, the start method "fork" of
multiprocessing, workers of a DataLoader). Children that C code forks do not run it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

_Thing = TypeVar("_Thing")


@dataclass(frozen=True, slots=True)
class _Owned:
    """The process that made an object, and what a child does with its copy."""

    pid: int
    forget: Callable[[Any, str], object] | None


_owned: WeakKeyDictionary[Any, _Owned] = WeakKeyDictionary()
_hooked = False


def forget_in_child(thing: _Thing, forget: Callable[[_Thing, str], object] | None = None) -> None:
    """In every process that is forked while ``thing`` lives, call ``forget(thing, reason)`` before `os.fork` returns.

    Args:
        thing: An object of this process: hashed by identity, and weakly referenced, so that this keeps nothing alive.
        forget: A function that does not refer to ``thing``; None: `owner` is all that is needed. It closes inherited
            descriptors with ``close``, never with ``shutdown``, which would end the connection of the parent, and
            makes later calls raise ClosedError with the reason, which continues the words "the group". It must not
            wait or take locks, because other threads of the parent do not exist in the child; it may run twice, in a
            child and in a child of that. What it raises is ignored.
    """
    global _hooked
    if not _hooked and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget_inherited)
    _hooked = True
    _owned[thing] = _Owned(os.getpid(), forget)


def close_in_child(sock: socket.socket) -> None:
    """Close a socket in every process that is forked while it is open."""
    forget_in_child(sock, _close)


def owner(thing: object) -> int | None:
    """Return the id of the process that passed ``thing`` to `forget_in_child`, or None: nobody has."""
    owned = _owned.get(thing)
    return None if owned is None else owned.pid


def reason(pid: int) -> str:
    """Return why this process cannot use a group of process ``pid``, to continue the words "the group"."""
    return (
        f"belongs to process {pid}, from which this process ({os.getpid()}) was forked; use it in process {pid} alone, "
        "or start this process with 'spawn' instead of 'fork'"
    )


def _close(sock: socket.socket, reason: str) -> None:
    sock.close()


def _forget_inherited() -> None:
    for thing, owned in list(_owned.items()):
        if owned.forget is not None and owned.pid != os.getpid():
            with contextlib.suppress(BaseException):  # an exception here would be printed in each child
                owned.forget(thing, reason(owned.pid))
