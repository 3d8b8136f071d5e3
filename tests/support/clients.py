"""Programs of tests that run a client of tokenferry, as it is published.

One version of each client is installed with the extra `test`. Others lie in folders, into which `make test` puts them.
"""

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import tokenferry

BENCH = Path(__file__).parents[1] / "clients" / "bench_client.py"
"""Runs `tokenferry bench transformers`."""

FOLDERS = Path(sys.prefix) / "clients"
"""Where the Makefile puts versions of clients that cannot be installed together with the others."""


def folder_of(client: str, version: str) -> str:
    """Return the folder to put on PYTHONPATH for this version, empty if it is installed; skip the test without one."""
    try:
        if metadata.version(client) == version:
            return ""
    except metadata.PackageNotFoundError:
        pass
    folder = FOLDERS / f"{client}-{version}"
    if not folder.is_dir():
        pytest.skip(f"{client} {version} is neither installed nor in {folder}: `make test` puts it there")
    return str(folder)


def need(*packages: str) -> None:
    """Skip the test unless these packages can be imported."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"there is no {package} here: `make test` installs it")


def run(program: Path, *folders: str, **variables: str) -> list[str]:
    """Run a program on CPUs, with these folders first on its path; return the lines that it printed."""
    own = [str(Path(tokenferry.__file__).parents[1]), str(Path(__file__).parents[1])]
    path = [*filter(None, folders), *own, os.environ.get("PYTHONPATH", "")]
    # On a host with GPUs clients would put their models there.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "CUDA_VISIBLE_DEVICES": ""} | variables
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=240, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()
