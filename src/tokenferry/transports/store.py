"""Questions to the store of a process group, which take a second at most: its host may be gone, or cut off.

A store waits much longer for its host, minutes by default, and only some of its methods take a timeout.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

STORE_S = 1.0
"""Seconds for one question."""
_T = TypeVar("_T")


def ask(question: Callable[[], _T]) -> list[_T]:
    """Return the answer of a store, or an empty list if there is none in time, or it fails.

    Args:
        question: Calls methods of the store; it may go on for as long as they take, in a thread of its own.
    """
    answers: list[_T] = []

    def answer() -> None:
        with contextlib.suppress(RuntimeError, OSError):
            answers.append(question())

    thread = threading.Thread(target=answer, name="tokenferry store", daemon=True)
    with contextlib.suppress(RuntimeError, MemoryError):  # no thread is to be had
        thread.start()
        thread.join(STORE_S)
    return answers[:1]
