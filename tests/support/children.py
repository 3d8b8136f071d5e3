"""Functions that run in a forked child, and return to the parent what they found."""

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
