"""The tests that tests/cuda/sanitize.py names exist: a run under compute-sanitizer ends at a name that pytest lacks."""

import subprocess
import sys
from pathlib import Path

CUDA = Path(__file__).parents[1] / "cuda"


def test_every_test_that_a_sanitizer_runs_exists():
    names = [sys.executable, "-c", "import sanitize; print(*sanitize.ONE_RANK, *sanitize.MORE_RANKS, sep='\\n')"]
    listed = subprocess.run(names, cwd=CUDA, capture_output=True, text=True, check=True).stdout.splitlines()
    collect = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "--quiet", *listed]
    done = subprocess.run(collect, cwd=CUDA, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
