"""What a process still holds: descriptors, and mappings of the memory of groups. Linux only."""

from __future__ import annotations

import collections
import gc
import os
import time
from pathlib import Path

CLOSING_S = 2.0
"""Seconds after which nothing of a closed group may be left."""


def descriptors() -> collections.Counter[str]:
    """Return what the descriptors of this process refer to."""
    found = collections.Counter[str]()
    for name in os.listdir("/proc/self/fd"):
        try:
            found[os.readlink(f"/proc/self/fd/{name}")] += 1
        except OSError:  # that of the folder itself
            continue
    return found


def what_is_left(before: collections.Counter[str], *, cuda: bool) -> str:
    """Return what is left of closed groups after a while."""
    deadline = time.monotonic() + CLOSING_S
    while True:
        gc.collect()
        more = descriptors() - before
        maps = Path("/proc/self/maps").read_text().count("memfd:tokenferry")
        # The driver opens files of its own whenever it likes.
        names = [name for name in sorted(more) if not cuda or name.startswith(("socket:", "/memfd:tokenferry"))]
        left = [f"{more[name]} x {name}" for name in names]
        left += [f"{maps} mappings of segments"] if maps else []
        if not left or time.monotonic() > deadline:
            return f"left after close(): {', '.join(left)}" if left else ""
        time.sleep(0.05)
