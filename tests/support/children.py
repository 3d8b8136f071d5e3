"""Forked children: functions that run in one and return what they found, and children that only live on."""

import ctypes
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from typing import Any

CHILD_S = 30
"""A child that takes longer ends by SIGALRM."""


def in_child(fn: Callable[[], Any]) -> Any:
    """Return what ``fn`` returns in a forked child; a failure there is an AssertionError here."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(CHILD_S)
        os.close(reader)
        try:
            answer = pickle.dumps((True, fn()))
        except BaseException:  # noqa: BLE001 - the parent reports everything
            answer = pickle.dumps((False, traceback.format_exc()))
        with os.fdopen(writer, "wb") as file:
            file.write(answer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        answer = file.read()
    status = os.waitpid(pid, 0)[1]
    assert answer, f"the child ended without an answer, with status {status}"
    good, value = pickle.loads(answer)
    assert good, value
    return value


def end_process() -> None:
    """End this process at once. Coverage replaces `os._exit` by a function that has no pickle; this one has."""
    os._exit(1)


def leave_child(how: str, closed: frozenset[int] = frozenset()) -> int:
    """Fork a child that does nothing until it is killed; return its process id.

    Args:
        how: ``"fork"``: as Python forks; ``"fork in C"``: as a C library does, without the hooks of Python.
        closed: Descriptors that the child closes.
    """
    # PyDLL keeps the GIL, so that the child has it.
    pid = os.fork() if how == "fork" else ctypes.PyDLL(None).fork()
    if pid == 0:
        signal.alarm(CHILD_S)
        for fd in closed:
            os.close(fd)
        signal.pause()
        os._exit(0)
    return pid


def open_descriptors() -> dict[int, str]:
    """Return the descriptors of this process, and what each refers to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return found
