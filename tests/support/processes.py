"""Processes of this host, as /proc shows them."""

import time
from collections.abc import Collection
from pathlib import Path


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


def left_after(timeout_s: float, pids: Collection[int]) -> set[int]:
    """Those of some processes that are still there after a time; returns as soon as there are none."""
    deadline = time.monotonic() + timeout_s
    while (left := set(pids) & set(parents())) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left
