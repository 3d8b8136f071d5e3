"""transformers, unmodified: its models, with their experts on four ranks; see `transformers_client.py`."""

from pathlib import Path

import pytest

from support import clients

CLIENT = Path(__file__).parent / "transformers_client.py"


@pytest.mark.parametrize("version", ["5.24.0", "5.18.0"])
def test_models_give_what_they_give_in_one_process(version):
    """By the registry of expert-parallel implementations, and in 5.18 by that of experts functions."""
    folder = clients.folder_of("transformers", version)
    clients.need("tokenizers", "accelerate")
    found, where = clients.run(CLIENT, folder)[-1].split()
    assert found == version
    assert where.startswith(folder)
