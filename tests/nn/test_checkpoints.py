"""Checkpoints of models with layers: of all experts, for any number of ranks, with the tools of torch alone."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

import tokenferry
from support.checkpoint_jobs import load_bare, resume, save, save_bare, take_over
from support.training_jobs import SHAPE, Model, Recipe
from tokenferry.nn import MoELayer

RECIPES = [Recipe("hand"), Recipe("ddp"), Recipe("fsdp")]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.tool)
def test_a_run_goes_on_with_other_ranks(worlds, recipe, tmp_path):
    """Parameters and the state of AdamW, saved by four ranks: the next losses are those that four would have had."""
    saved = worlds(4).run(save, recipe, tmp_path)
    want = saved[0][0]
    for ranks in (4, 2):
        for got in worlds(ranks).run(resume, recipe, tmp_path):
            assert got == pytest.approx(want, rel=1e-12)
    assert resume(0, None, recipe, tmp_path) == pytest.approx(want, rel=1e-12)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("tool", ["ddp", "fsdp"])
def test_a_run_goes_on_with_experts_on_other_ranks(worlds, tool, tmp_path):
    """Experts on two of four ranks, and again on the others; on all four; alone."""
    twice, spread = Recipe(tool, expert_ranks=2), Recipe(tool)
    for before, after in ((twice, spread), (spread, twice), (twice, Recipe(tool, expert_ranks=1))):
        folder = tmp_path / f"{before.expert_ranks} to {after.expert_ranks}"
        want = worlds(4).run(save, before, folder)[0][0]
        for got in worlds(4).run(resume, after, folder):
            assert got == pytest.approx(want, rel=1e-12)
        assert resume(0, None, after, folder) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.tool)
def test_to_and_from_the_state_of_one_process(worlds, recipe, tmp_path):
    full = worlds(4).run(save, recipe, tmp_path)[0][1]
    with tokenferry.ExpertGroup(None, SHAPE) as group:
        model = Model(group, recipe.dtype)
        initial = model.moe[1].experts.up.detach().clone()
        model.load_state_dict(full)
        assert not torch.equal(model.moe[1].experts.up, initial), "training has changed nothing"
    for state in worlds(2).run(take_over, recipe, full):
        for name, value in state.items():
            assert torch.equal(value, full[name]), name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_layer_without_preparation(worlds, tmp_path):
    """All E experts are saved, and every rank gets its own back, not those of rank 0."""
    worlds(4).run(save_bare, tmp_path)
    with tokenferry.ExpertGroup(None, SHAPE) as group:
        want = MoELayer(group, 12, seed=5).state_dict()
        alone = MoELayer(group, 12, seed=6).state_dict()
        dcp.load(alone, checkpoint_id=tmp_path)
    for state in (alone, *worlds(2).run(load_bare, tmp_path), *worlds(4).run(load_bare, tmp_path)):
        assert state.keys() == want.keys()
        for name, value in want.items():
            assert torch.equal(state[name], value), name
