"""What a measurement says: one line a call and mode, what it ran on, and the same as JSON."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import tokenferry
from tokenferry.bench.core.clock import Summary, summarize
from tokenferry.bench.core.inputs import Spec
from tokenferry.bench.suites.cpu_calls import Samples

SCHEMA = 1

BYTES = (
    "row bytes that a rank sends, those to itself included, mean over ranks: dispatch and fast combine one row per "
    "token and distinct rank, exact decode combine one row per token and expert; ids, weights and counts are not in it"
)
CHECKED = (
    "dispatch, redispatch and decode dispatch: every row bit-equal; combine and exact decode combine: every sum "
    "bit-equal; fast decode combine and FP8 rows: within their rounding bounds"
)

HEADER = ("call", "mode", "median us", "p05", "p95", "gloo us", "p05", "p95", "ratio", "MB/rank", "GB/s")


@dataclass(frozen=True, slots=True)
class Line:
    """One call in one mode over one transport.

    Attributes:
        transport: ``"shared_memory"`` or ``"process_group"``.
        call: Name of the call.
        mode: ``"drained"``: ranks synchronised before each call; ``"chained"``: calls back to back.
        row_bytes: See `BYTES`.
        ours: The call.
        gloo: all_to_all_single of the same bytes, in the same process group, in turns with the call.
        ratio: Median of ours over median of gloo.
    """

    transport: str
    call: str
    mode: str
    row_bytes: float
    ours: Summary
    gloo: Summary
    ratio: float


def lines(transport: str, by_rank: Sequence[Sequence[Samples]]) -> list[Line]:
    """Put the samples of all ranks together: for each call and mode the slowest rank of each iteration."""
    result = []
    for ranks in zip(*by_rank, strict=True):
        for mode in ranks[0].ours:
            ours = summarize([samples.ours[mode] for samples in ranks])
            gloo = summarize([samples.limit[mode] for samples in ranks])
            row_bytes = sum(samples.row_bytes for samples in ranks) / len(ranks)
            result.append(Line(transport, ranks[0].call, mode, row_bytes, ours, gloo, ours.median_us / gloo.median_us))
    return result


def cells(line: Line) -> list[str]:
    """One row of the table under `HEADER`."""
    times = [f"{us:.0f}" for s in (line.ours, line.gloo) for us in (s.median_us, s.p05_us, s.p95_us)]
    rate = line.row_bytes / line.ours.median_us / 1e3
    return [line.call, line.mode, *times, f"{line.ratio:.2f}", f"{line.row_bytes / 1e6:.2f}", f"{rate:.2f}"]


def machine() -> dict[str, str | float]:
    """Return what the numbers belong to: processor, cores, their load of the last minute, system, Python, torch."""
    return {
        "processor": _processor(),
        "cores": num_cores(),
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(ranks: int) -> int:
    """Threads for each rank: one as soon as ranks fill the cores, else the cores shared out."""
    return max(1, num_cores() // ranks)


def commit(folder: Path | None = None) -> str | None:
    """Return the commit that this package was loaded from, with ``-dirty`` if it was changed; None outside a clone."""
    folder = Path(__file__).resolve().parent if folder is None else folder
    try:
        _git(folder, "ls-files", "--error-unmatch", "report.py")  # the package may lie inside another project's clone
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def as_json(spec: Spec, threads: int, command: str, results: Sequence[Line]) -> dict[str, Any]:
    """Return the whole report as plain dicts; ``schema`` counts up when a field changes its meaning."""
    return {
        "schema": SCHEMA,
        "tokenferry": tokenferry.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine(),
        "threads_per_rank": threads,
        "spec": dataclasses.asdict(spec),
        "bytes": BYTES,
        "checked": CHECKED,
        "results": [dataclasses.asdict(line) for line in results],
    }


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
