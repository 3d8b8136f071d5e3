"""Layers on GPUs: every kind of them, eager, checkpointed and compiled, beside the same layer on CPUs."""

import importlib.util
import shutil

import pytest

from support.gpu_layers import HOW, KINDS, balanced, layers
from support.pairs import Pair

PAIR = Pair("cuda", "nvlink")

COMPILERS = importlib.util.find_spec("triton") is not None and shutil.which("cc") is not None
"""What the code needs that torch.compile generates."""


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_computes_what_it_does_on_cpus(worlds, name):
    hows = tuple(how for how in HOW if how != "generated")
    worlds(2, "cuda").run(layers, PAIR, name, hows)


@pytest.mark.skipif(not COMPILERS, reason="torch.compile needs Triton and a C compiler to generate code")
@pytest.mark.parametrize("name", ["float32", "bfloat16", "FP8 rows", "losses and capacity"])
def test_a_layer_with_generated_code(worlds, name):
    worlds(2, "cuda").run(layers, PAIR, name, ("generated",))


def test_experts_move_between_gpus(worlds):
    worlds(2, "cuda").run(balanced, PAIR)
