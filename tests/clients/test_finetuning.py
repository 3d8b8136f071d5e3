"""The program of `examples/` that fine-tunes a model of transformers: on two ranks it does what it does on one."""

import re
from pathlib import Path

import pytest
import torch

from support import clients
from support.example_jobs import start_example

PROGRAM = Path(__file__).parents[2] / "examples" / "finetune_transformers.py"


def tune(output, **start):
    """Return the losses that the program prints, and the weights that it saves."""
    from safetensors.torch import load_file

    printed = start_example(PROGRAM, "--steps", 3, "--output", output, **start)
    losses = [float(loss) for loss in re.findall(r"^step \d: loss ([\d.]+), ", printed, re.MULTILINE)]
    return losses, load_file(output / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same in one process, which needs nothing of tokenferry."""
    clients.need("transformers", "tokenizers", "safetensors")
    losses, weights = tune(tmp_path_factory.mktemp("tuned"))
    assert len(losses) == 3
    return losses, weights


@pytest.mark.parametrize("version", ["5.24.0", "5.22.0", "5.18.0"])
def test_two_ranks_tune_the_model_of_one(alone, version, tmp_path):
    """By the registry of expert-parallel implementations; before 5.23 by that of experts functions."""
    losses, weights = tune(tmp_path, path=clients.folder_of("transformers", version), ranks=2)
    assert losses == pytest.approx(alone[0], rel=1e-5)
    assert weights.keys() == alone[1].keys()
    for name, weight in alone[1].items():
        torch.testing.assert_close(
            weights[name], weight, rtol=0.0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
