"""Megatron-Core, unmodified, as a client of the shim under its bare name; see `megatron_client.py`."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tokenferry.compat import deep_ep_path


@pytest.mark.parametrize("nodes", [1, 2])
def test_megatron_core_runs_forward_and_backward(nodes):
    """Its DeepEP and its HybridEP dispatcher, on one node of four ranks, and on two of two."""
    assert metadata.version("megatron-core") == "0.16.1"
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([deep_ep_path.folder(), tests, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env = os.environ | {"PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1", "TOKENFERRY_RANKS_PER_NODE": str(4 // nodes)}
    client = Path(__file__).parent / "megatron_client.py"
    done = subprocess.run([sys.executable, client], capture_output=True, text=True, timeout=180, env=env, check=False)
    assert done.returncode == 0, done.stderr
    found, where = done.stdout.strip().splitlines()[-2:]
    assert found == f"{nodes} nodes"
    assert where.startswith(deep_ep_path.folder())
