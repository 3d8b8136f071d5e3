"""Whole calls of R virtual ranks in one process, judged by the checks of the contract suite."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).with_name("virtual_group.py")
ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",  # a queue for each stream: no rank's kernel stands in front of a peer's
    "CUDA_MODULE_LOADING": "EAGER",  # nothing is loaded while ranks wait for each other
}


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_round_trips_in_every_layout(num_ranks):
    done = subprocess.run(
        [sys.executable, str(JOB), str(num_ranks)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    assert f"{num_ranks} virtual ranks: all right" in done.stdout
