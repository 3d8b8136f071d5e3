"""The origin of numbers: this machine, and the version, commit and command of the measurement."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import tokenferry
from tokenferry import env


def about(command: str) -> dict[str, Any]:
    """Return what every report begins with."""
    return {
        "tokenferry": tokenferry.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": _called(command),
        "machine": machine(),
    }


def lines(command: str) -> list[str]:
    """Return the lines that every command prints first: version, commit, torch, and how it was called."""
    version = f"tokenferry {tokenferry.__version__}, commit {commit() or 'unknown'}"
    return [
        f"{version}, Python {platform.python_version()}, torch {torch.__version__}",
        f"command: {_called(command)}",
    ]


def _called(command: str) -> str:
    """Return a command with the variable that decides which code its kernels are, if that is set."""
    arch = env.read_one("arch")
    return f"TOKENFERRY_ARCH={arch} {command}" if arch else command


def machine() -> dict[str, str | float]:
    """Return processor, cores, their load of the last minute, system, Python, torch."""
    return {
        "processor": _processor(),
        "cores": num_cores(),
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(ranks: int) -> int:
    """Return the threads for each rank: one as soon as ranks fill the cores, else the cores shared out."""
    return max(1, num_cores() // ranks)


def commit(file: Path = Path(__file__)) -> str | None:
    """Return the commit that ``file`` was loaded from, with ``-dirty`` if the clone was changed; None outside one."""
    folder = file.resolve().parent
    try:
        _git(folder, "ls-files", "--error-unmatch", file.name)  # the package may lie inside another project's clone
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


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
