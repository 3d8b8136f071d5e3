"""transformers, unmodified: its models, with their experts on several ranks; see the programs beside this file."""

import os
from pathlib import Path

import pytest
import torch

from support import clients

FOLDER = Path(__file__).parent
CLIENT = FOLDER / "transformers_client.py"
VERSIONS = ("5.24.0", "5.22.0", "5.18.0")


def run(program, version):
    """Run a program with this version of transformers."""
    folder = clients.folder_of("transformers", version)
    clients.need("tokenizers", "accelerate")
    found, where = clients.run(program, folder)[-1].split()
    assert found == version
    assert where.startswith(folder)


@pytest.mark.parametrize("version", VERSIONS)
def test_models_give_what_they_give_in_one_process(version):
    """By the registry of expert-parallel implementations; before 5.23 by that of experts functions."""
    run(CLIENT, version)


@pytest.mark.parametrize("version", VERSIONS)
def test_experts_give_the_same_bits_without_another_sort(version):
    run(FOLDER / "grouped_experts_client.py", version)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_models_on_two_gpus():
    """Whichever version there is; ranks and process groups of NCCL, as transformers makes them."""
    clients.need("transformers", "tokenizers", "accelerate")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
    assert clients.run(CLIENT, CUDA_VISIBLE_DEVICES=visible, TOKENFERRY_BACKEND="cuda")
