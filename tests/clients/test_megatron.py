"""Megatron-Core, unmodified, as a client of the shim under its bare name; see `megatron_client.py`."""

from pathlib import Path

import pytest

from support import clients
from tokenferry.compat import deep_ep_path

CLIENT = Path(__file__).parent / "megatron_client.py"


@pytest.mark.parametrize(("version", "nodes"), [("0.16.1", 1), ("0.16.1", 2), ("0.19.2", 1)])
def test_megatron_core_runs_forward_and_backward(version, nodes):
    """Its DeepEP and its HybridEP dispatcher, on one node of four ranks, and on two of two."""
    folder = clients.folder_of("megatron-core", version)
    clients.need("numpy")
    variables = {"TORCHDYNAMO_DISABLE": "1", "TOKENFERRY_RANKS_PER_NODE": str(4 // nodes)}
    found, where, loaded = clients.run(CLIENT, deep_ep_path.folder(), folder, **variables)[-3:]
    assert found == f"{nodes} nodes"
    assert where.startswith(deep_ep_path.folder())
    known, file = loaded.split()
    assert known.partition("+")[0] == version, "in a git checkout it adds a commit"
    assert file.startswith(folder)
