"""Megatron-Core, unmodified, as a client of the shim under its bare name; see `megatron_client.py`."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from tokenferry.compat import deep_ep_path


def test_megatron_core_runs_forward_and_backward():
    assert metadata.version("megatron-core") == "0.16.1"
    path = os.pathsep.join([deep_ep_path.folder(), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env = os.environ | {"PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1"}
    client = Path(__file__).parent / "megatron_client.py"
    done = subprocess.run([sys.executable, client], capture_output=True, text=True, timeout=180, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith(deep_ep_path.folder())
