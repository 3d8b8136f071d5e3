"""The time until the first call of a process is done: a program of its own, run once with no compiled kernels.

``python -m tokenferry.bench.suites.first_call cuda`` prints one JSON line of seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import torch

import tokenferry
from tokenferry.types import BackendName

TIMEOUT_S = 120.0


def run_both(device: BackendName) -> dict[str, dict[str, float]]:
    """Start two processes, the first with an empty folder of compiled kernels; return the seconds of each step.

    Raises:
        OSError, subprocess.SubprocessError: a process failed or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="tokenferry-first-call-") as folder:
        return {name: _run(device, folder) for name in ("nothing compiled", "second start")}


def _run(device: BackendName, folder: str) -> dict[str, float]:
    # `env` sets the variable for the child only: nothing here writes to this process's environment.
    command = [
        "env",
        f"TOKENFERRY_CACHE_DIR={folder}",
        sys.executable,
        "-m",
        "tokenferry.bench.suites.first_call",
        device,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise OSError(f"the process ended with {done.returncode}: {done.stderr.strip()[-600:]}")
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def measure(device: BackendName) -> dict[str, float]:
    """Time the steps in this process: torch's context, the group, its kernels, the first and the second calls."""
    marks: list[tuple[str, float]] = [("", time.perf_counter())]

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter()))

    where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    x = torch.zeros(16, 1024, device=where, dtype=torch.bfloat16)
    topk_idx = torch.zeros(16, 2, dtype=torch.int64, device=where)
    _synchronize(device)
    mark("device context")
    shape = tokenferry.MoeShape(num_experts=8, top_k=2, hidden=1024, max_tokens=16)
    with tokenferry.ExpertGroup(None, shape, backend=device) as group:
        mark("make the group")
        group.warmup()
        mark("warmup: all kernels")
        for name in ("first dispatch and combine", "second dispatch and combine"):
            sent = group.dispatch(x, tokenferry.Routing(topk_idx))
            assert isinstance(sent.x, torch.Tensor)
            group.combine(sent.x, sent.plan)
            _synchronize(device)
            mark(name)
    return {name: end - start for (_, start), (name, end) in itertools.pairwise(marks)}


def _synchronize(device: BackendName) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure on the device that the command line names, and print the seconds."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tokenferry.bench.suites.first_call", description=about)
    parser.add_argument("device", choices=("cpu", "cuda"), help="the backend")
    device: BackendName = parser.parse_args(argv).device
    if device == "cuda" and not torch.cuda.is_available():
        parser.exit(3, f"{parser.prog}: cuda: torch sees no GPU; use cpu\n")
    sys.stdout.write(json.dumps(measure(device)) + "\n")


if __name__ == "__main__":
    main()
