"""Processes of this host, as /proc shows them."""

import re
import time
from collections.abc import Collection
from pathlib import Path

LOOK_S = 0.02
"""Seconds between two looks at /proc."""


def parents() -> dict[int, int]:
    """The parent of each process, without those that have ended and wait to be collected."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        if words[0] not in "ZX":
            found[int(folder.name)] = int(words[1])
    return found


def descendants(pid: int) -> set[int]:
    """All processes that a process has started, and those that these have."""
    found, by_pid = {pid}, parents()
    while more := {child for child, parent in by_pid.items() if parent in found and child not in found}:
        found |= more
    return found - {pid}


def left_after(timeout_s: float, pids: Collection[int]) -> dict[int, str]:
    """Those of some processes that are still there after a time, and what they do; empty as soon as there are none.

    The time is counted in looks: a machine that stands still for its length stops the processes too.
    """
    for _ in range(round(timeout_s / LOOK_S)):
        if not set(pids) & set(parents()):
            return {}
        time.sleep(LOOK_S)
    return {pid: doing(pid) for pid in set(pids) & set(parents())}


def doing(pid: int) -> str:
    """What a process is and does, for a message: its command, state, and where in the kernel each thread waits."""
    folder = Path("/proc", str(pid))
    try:
        command = (folder / "cmdline").read_text().replace("\0", " ")
        state = re.search(r"State:\s*(.*)", (folder / "status").read_text())
        waits = [f"{thread.name}: {(thread / 'wchan').read_text()}" for thread in (folder / "task").iterdir()]
    except OSError as error:
        return f"cannot be read: {error}"
    return f"{command[-200:]!r}, {state and state[1]}, threads wait in {waits}"
