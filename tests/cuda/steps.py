"""Run the tests that need GPUs: python tests/cuda/steps.py [step ...] [--within-s SECONDS] [--out FOLDER].

Each step is a run of pytest with a limit of its own, so that a kernel that hangs costs no more than that. Without names
all steps run for which there are enough GPUs; ``--list`` shows them. What a step prints is in FOLDER/STEP.log; a table
of results comes last. Steps run one after another, since they wait for one another on a GPU.

Exit status: 0 if every step that was asked for has passed; 1 if one failed or was not run; 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENDING_S = 10.0
"""Seconds in which pytest can end its ranks, once it is told to."""


@dataclass(frozen=True)
class Step:
    """A run of pytest.

    Args:
        tests: Its arguments.
        limit_s: Seconds after which it is stopped: twice what it took on H200, or more.
        gpus: How many it needs.
        env: Variables for it.
    """

    tests: tuple[str, ...]
    limit_s: float
    gpus: int = 1
    env: dict[str, str] = field(default_factory=dict)


OLDER = {"TOKENFERRY_ARCH": "compute_80"}
"""Kernels as GPUs before SM90 run them."""

STEPS = {
    "contract": Step(("tests/contract", "-k", "cuda"), 240),
    "deep_ep": Step(("tests/compat/test_deep_ep_cuda.py",), 180),
    "deep_ep-v2": Step(("tests/compat/test_deep_ep_elastic_cuda.py", "tests/compat/test_deep_ep_hybrid_cuda.py"), 180),
    "faults": Step(("tests/faults", "-k", "cuda or nvlink"), 600),
    "kernels": Step(
        ("tests/cuda", "--ignore=tests/cuda/test_across_gpus.py", "--ignore=tests/cuda/test_layers.py"), 600
    ),
    "layers": Step(("tests/cuda/test_layers.py",), 300),
    "tools": Step(("tests/nn/test_tools_on_gpus.py",), 400),
    "transformers": Step(("tests/clients/test_expert_parallel_cuda.py",), 120),
    "nodes-of-one": Step(("tests/cuda/test_across_gpus.py", "-k", "2x1"), 450),
    "contract-nodes": Step(
        ("tests/contract", "-k", "cuda and not soak"), 300, env={"TEST_CUDA_NODES": "1", "TEST_CUDA_RANKS": "2,3"}
    ),
    "contract-older": Step(("tests/contract", "-k", "cuda and not soak"), 240, env=OLDER),
    "bad-calls-older": Step(
        ("tests/faults/test_bad_calls.py", "tests/faults/test_bad_routing.py", "-k", "cuda or nvlink"), 240, env=OLDER
    ),
    "lost-ranks-older": Step(("tests/faults/test_lost_ranks.py", "-k", "cuda or nvlink"), 240, env=OLDER),
    "exits-older": Step(
        ("tests/faults/test_go_on.py", "tests/faults/test_exit.py", "-k", "cuda or nvlink"), 240, env=OLDER
    ),
    "nodes-of-two": Step(("tests/cuda/test_across_gpus.py", "-k", "2x2"), 500, gpus=2),
    "nvshmem": Step(("tests/cuda/test_nvshmem_gpus.py",), 120, gpus=2),
    "contract-more": Step(
        ("tests/contract", "-k", "cuda and not soak"), 500, gpus=4, env={"TEST_CUDA_RANKS": "4,5,6,7,8"}
    ),
}


def num_gpus() -> int:
    """Count them, without importing torch in this process."""
    count = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(count, capture_output=True, text=True, check=True).stdout)


def gpus_of(step: Step) -> str:
    """Return how many it needs, in words."""
    return f"{step.gpus} GPU{'s' * (step.gpus > 1)}"


def run(step: Step, log: Path, limit_s: float) -> tuple[bool, str, float]:
    """Return whether it passed, what pytest says last, and its seconds."""
    paths = f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    env = os.environ | step.env | {"PYTHONPATH": paths}
    # No -q: the file has one, and of two pytest says nothing at the end.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(ROOT / "pyproject.toml"),
        "-p",
        "no:cacheprovider",
        *step.tests,
    ]
    start, status = time.monotonic(), None
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDING_S)
        finally:
            # Ranks that outlive pytest would keep the GPU from the next step.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = time.monotonic() - start
    if status is None:
        return False, f"stopped after {limit_s:.0f} s", took
    said = [line.strip("= ") for line in log.read_text(errors="replace").splitlines() if line.strip()]
    result = next(
        (line for line in reversed(said) if re.search(r"\d+ (passed|failed|error|skipped|deselected)", line)), ""
    )
    # Where everything was skipped nothing has been shown.
    return status == 0 and " passed" in result, result or (said or ["it said nothing"])[-1], took


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="step", help="default: all for which there are enough GPUs")
    parser.add_argument("--within-s", type=float, default=float("inf"), help="seconds for all steps together")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "steps", help="folder for logs")
    parser.add_argument("--list", action="store_true", help="show the steps and run none")
    found = parser.parse_args(arguments)
    unknown = [name for name in found.steps if name not in STEPS]
    if unknown:
        parser.error(f"{unknown[0]}: no such step; there are {', '.join(STEPS)}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    found = parsed(arguments)
    if found.list:
        for name, step in STEPS.items():
            env = "".join(f"{key}={value} " for key, value in step.env.items())
            print(f"{name}: {gpus_of(step)}, {step.limit_s:.0f} s: {env}pytest {shlex.join(step.tests)}")
        return 0
    found.out.mkdir(parents=True, exist_ok=True)
    gpus, end, rows = num_gpus(), time.monotonic() + found.within_s, []
    for name in found.steps or [name for name, step in STEPS.items() if step.gpus <= gpus]:
        step, left = STEPS[name], end - time.monotonic()
        if step.gpus > gpus:
            rows.append((name, False, f"not run: needs {gpus_of(step)}, has {gpus}", 0.0))
        elif left < min(step.limit_s, 30.0):
            rows.append((name, False, "not run: no time was left", 0.0))
        else:
            rows.append((name, *run(step, found.out / f"{name}.log", min(step.limit_s, left))))
            print(f"{rows[-1][0]}: {rows[-1][2]}", flush=True)
    print("\nstep | passed | seconds | pytest")
    for name, passed, said, seconds in rows:
        print(f"{name} | {'yes' if passed else 'NO'} | {seconds:.0f} | {said}")
    return 0 if rows and all(passed for _, passed, _, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
