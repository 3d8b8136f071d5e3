"""Layers under the tools that everyone trains with, on GPUs with NCCL: what `tests/nn` says of them on CPUs."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch

from support import checkpoint_jobs, parallel_jobs
from support.closeness import all_close, close, same_training
from support.pairs import NUM_GPUS
from support.training_jobs import LIMIT, Model, Recipe, open_group, train, train_alone
from tokenferry.bench.core.default_group import replace_default_group
from tokenferry.env import play_node
from tokenferry.nn import GradScaler
from tokenferry.testing.world import World

DEVICES, BACKEND = ("cpu", "gloo") if os.environ.get("TEST_TOOLS_ON_CPUS") == "1" else ("cuda", "nccl")
"""With TEST_TOOLS_ON_CPUS=1 these tests can be tried without GPUs."""
pytestmark = pytest.mark.skipif(DEVICES == "cuda" and not NUM_GPUS, reason="needs an NVIDIA GPU")

TOOLS = ("hand", "ddp", "fsdp")
COMPILERS = importlib.util.find_spec("triton") is not None and shutil.which("cc") is not None
"""What the code needs that torch.compile generates for GPUs."""
WITHIN = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Products of GPUs add up in another order."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[], World]]:
    """Return two ranks in a default process group for the tensors of their devices; new ones after a job failed."""
    made: list[World] = []

    def get() -> World:
        if not made or not made[-1].alive:
            made.append(World(2, devices=DEVICES, timeout_s=240.0))
            made[-1].run(prepare_rank)
        return made[-1]

    yield get
    for world in made:
        world.close()


def prepare_rank(rank, pg):
    if NUM_GPUS == 1:
        # NCCL lets two ranks share a GPU if it takes them for ranks of two hosts. Groups have one node all the same.
        play_node(rank, ranks_per_node=1)
        del os.environ["TOKENFERRY_RANKS_PER_NODE"]
    torch.backends.cuda.matmul.allow_tf32 = False
    replace_default_group(pg, BACKEND)


RECIPES = [
    *(Recipe(tool, dtype) for tool in TOOLS for dtype in WITHIN),
    *(Recipe(tool, optimizer=kind) for tool in TOOLS for kind in ("foreach", "fused")),
    *(Recipe(tool, optimizer=kind) for tool in TOOLS[1:] for kind in ("SGD", "Adam")),
    *(Recipe(tool, expert_ranks=1) for tool in TOOLS[1:]),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.tool}-{r.dtype}-{r.optimizer}-{r.expert_ranks}")
def test_two_ranks_are_one_process_on_a_cpu(ranks, recipe):
    """Losses, gradients, norms, clipping, optimizers and moving averages."""
    want, results = train_alone(recipe, num_ranks=2), ranks().run(train, recipe)
    within = WITHIN[recipe.dtype]
    assert min(want["norms"]) > LIMIT, "clipping is not tried"
    same_training(results, want, within)


def test_ranks_raise_without_help(ranks):
    for errors, kept in ranks().run(parallel_jobs.unprepared):
        assert kept, "experts were overwritten"
        assert len(errors) == 8, errors


def test_clipping_without_help_raises(ranks):
    for message in ranks().run(parallel_jobs.clipped_at_once):
        assert "got mixed torch.Tensor and DTensor" in message


def test_moving_averages_of_sharded_models(ranks):
    for model, average in ranks().run(parallel_jobs.averaged_fsdp):
        for name, value in model.items():
            close(name, average[name], value * (2 / 3), 1e-15)


def test_mixed_precision_of_sharded_models(ranks):
    want = parallel_jobs.narrow_alone()
    for got in ranks().run(parallel_jobs.narrow_fsdp):
        assert got.pop("dtype") == torch.bfloat16
        all_close(got, want, 0.1)


@pytest.mark.parametrize("tool", TOOLS)
def test_layers_made_on_meta(ranks, tool):
    with open_group(None) as group:
        want = {f"moe.{name}": value for name, value in Model(group, torch.float32).moe.state_dict().items()}
    for got in ranks().run(parallel_jobs.from_meta, tool):
        all_close(got, want, 0.0)


HOWS = (
    *("checkpointed", "reentrant", "compiled"),
    *(
        pytest.param(how, marks=pytest.mark.skipif(not COMPILERS, reason="needs Triton and a C compiler"))
        for how in ("generated", "generated in place")
    ),
)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("tool", TOOLS)
def test_models_are_checkpointed_and_compiled(ranks, tool, how):
    """A model around layers: without a tool, and under each."""
    for want, got in ranks().run(parallel_jobs.run_otherwise, tool, how):
        all_close(got, want, 1e-12)


@pytest.mark.parametrize("tool", TOOLS)
def test_second_derivatives(ranks, tool):
    found = ranks().run(parallel_jobs.differentiated, tool)
    for got in found:
        if tool == "fsdp":
            assert "storage of size 0" in got
        else:
            close("second", got, parallel_jobs.differentiated_alone(2), 1e-12)


@pytest.mark.parametrize(
    ("tool", "scaler"),
    [*((tool, GradScaler) for tool in TOOLS), ("fsdp", torch.amp.GradScaler)],
    ids=lambda value: value if isinstance(value, str) else value.__module__.partition(".")[0],
)
def test_scaled_gradients(ranks, tool, scaler):
    for got in ranks().run(parallel_jobs.scaled, tool, scaler):
        all_close(got["unscaled"], got["plain"], 1e-5)
        all_close(got["half"], got["plain"], 0.05)
        assert got["kept"], "an infinity on one rank did not keep all from the step"
        assert got["scale"] == 8.0


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("tool", TOOLS)
def test_checkpoints(ranks, tool, tmp_path):
    """Saved by two ranks; they go on, and so does one process on a CPU, with the same losses."""
    recipe = Recipe(tool)
    want, full = ranks().run(checkpoint_jobs.save, recipe, tmp_path)[0]
    for got in ranks().run(checkpoint_jobs.resume, recipe, tmp_path):
        assert got == pytest.approx(want, rel=1e-12)
    assert checkpoint_jobs.resume(0, None, recipe, tmp_path) == pytest.approx(want, rel=1e-12)
    for state in ranks().run(checkpoint_jobs.take_over, recipe, full):
        all_close(state, full, 0.0)
