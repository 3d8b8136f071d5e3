"""Progress of rank processes while a job runs: ranks append JSON lines to a file, the caller reads them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import IO, Any

from tokenferry.testing.world import World

POLL_S = 0.1


def send(progress: str, item: Mapping[str, object]) -> None:
    """Append one item to a progress file; an item is a small mapping of JSON values. Local, does not block."""
    with open(progress, "a", encoding="utf-8") as file:
        file.write(json.dumps(item) + "\n")


def run_with_progress(
    world: World, fn: Callable[..., Any], *args: object, on_item: Callable[[dict[str, Any]], None]
) -> list[Any]:
    """Call ``fn(rank, process_group, progress, *args)`` on every rank, and ``on_item`` in this process for each item.

    Returns:
        list: The results of the ranks, by rank.

    Raises:
        WorldError: as `World.run`.
    """
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", prefix="tokenferry-progress-") as file:
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(world.run, fn, file.name, *args)
            try:
                while not wait([job], timeout=POLL_S).done:
                    _read(file, on_item)
            except BaseException:
                world.stop()  # or leaving the pool would wait for the job to end by itself
                raise
        _read(file, on_item)
        return job.result()


def _read(file: IO[str], on_item: Callable[[dict[str, Any]], None]) -> None:
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(start, os.SEEK_SET)  # half a line: the rest is still being written
            return
        on_item(json.loads(line))
