"""Layers under the tools that everyone trains with: each must do on four ranks what it does in one process."""

import pytest
import torch

import tokenferry
from support import parallel_jobs as jobs
from support.closeness import all_close, close, same_training
from support.training_jobs import LIMIT, OTHERS, SHAPE, Model, Recipe, train, train_alone
from tokenferry.nn import GradScaler
from tokenferry.testing.world import WorldError

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
MISLED = ("Adafactor", "Rprop")
"""Optimizers of torch that take one rank's part of a DTensor for all of it, or refuse it."""
RECIPES = [
    *(Recipe(tool, dtype) for tool in ("hand", "ddp", "fsdp") for dtype in (torch.float64, torch.float32)),
    *(Recipe(tool, optimizer=kind) for tool in ("hand", "ddp", "fsdp") for kind in ("foreach", "fused")),
    *(Recipe(tool, optimizer=kind) for tool in ("ddp", "fsdp") for kind in OTHERS if kind not in MISLED),
    *(Recipe(tool, expert_ranks=ranks) for tool in ("ddp", "fsdp") for ranks in (1, 2)),
]


def name_of(recipe):
    spread = "" if recipe.expert_ranks is None else f"-experts on {recipe.expert_ranks}"
    return f"{recipe.tool}-{recipe.dtype}-{recipe.optimizer}{spread}"


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_four_ranks_are_one_process(worlds, recipe):
    """One rule for losses and gradients, norms, clipping, optimizers and moving averages."""
    want, results = train_alone(recipe), worlds(4).run(train, recipe)
    within = 1e-12 if recipe.dtype == torch.float64 else 1e-6
    assert min(want["norms"]) > LIMIT, "clipping is not tried"
    same_training(results, want, within)


def test_adafactor_is_misled(worlds):
    """The documents say so: torch takes the norm of one rank's part of a parameter for that of all of it."""
    recipe = Recipe("ddp", optimizer="Adafactor")
    got, want = worlds(4).run(train, recipe)[0]["parameters"], train_alone(recipe)["parameters"]
    start = dict(Model(tokenferry.ExpertGroup(None, SHAPE), recipe.dtype).named_parameters())
    name = next(name for name in want if "experts.gate" in name)
    assert (got[name] - want[name]).norm() > 0.01 * (want[name] - start[name].detach()).norm()


@pytest.mark.parametrize("recipe", [Recipe("ddp", optimizer="Rprop"), *(Recipe("fsdp", optimizer=k) for k in MISLED)])
def test_optimizers_that_torch_refuses(worlds, recipe):
    if recipe.optimizer == "Rprop" and TORCH >= (2, 15):
        same_training(worlds(4).run(train, recipe), train_alone(recipe), 1e-12)
        return
    words = "in-place operations that require placement changes are not supported"
    if recipe.optimizer == "Rprop" and TORCH < (2, 12):
        words = "does not have a sharding strategy registered"
    with pytest.raises(WorldError, match=words):
        worlds(4).run(train, recipe)


def test_ranks_raise_without_help(worlds):
    """Tools that would give every rank the experts of rank 0 raise, and have overwritten nothing."""
    for errors, kept in worlds(4).run(jobs.unprepared):
        assert kept
        assert len(errors) == 8, errors


def test_clipping_without_help_raises(worlds):
    for message in worlds(4).run(jobs.clipped_at_once):
        assert "got mixed torch.Tensor and DTensor" in message


def test_what_parallelize_refuses(worlds):
    for rank, messages in enumerate(worlds(4).run(jobs.refusals)):
        none, dimensions, ranks, device = messages
        assert "expected a module with at least one MoELayer, found none" in none
        assert "expected one dimension, got [2, 2]" in dimensions
        assert f"expected the ranks [0, 1, 2, 3] of the group of 'moe.0', got {[[0, 1], [2, 3]][rank // 2]}" in ranks
        assert "expected device type 'cpu' like the group of 'moe.0', got 'meta'" in device


def test_moving_averages_of_sharded_models(worlds):
    for model, average in worlds(4).run(jobs.averaged_fsdp):
        for name, value in model.items():
            close(name, average[name], value * (2 / 3), 1e-15)


def test_mixed_precision_of_sharded_models(worlds):
    want = jobs.narrow_alone()
    for got in worlds(4).run(jobs.narrow_fsdp):
        assert got.pop("dtype") == torch.bfloat16
        assert got.keys() == want.keys()
        for name, value in want.items():
            close(name, got[name], value, 0.1)


@pytest.mark.skipif(TORCH < (2, 12), reason="FSDP2 of torch 2.11 sees no tensors in a Routing")
def test_routers_of_narrow_models_are_sharded_apart(worlds):
    """FSDP2 wants one dtype for all parameters that it shards together, and routers are float32."""
    assert worlds(2).run(jobs.narrow_parameters, True) == ["", ""]
    for message in worlds(2).run(jobs.narrow_parameters, False):
        assert "expects uniform original parameter dtype" in message


@pytest.mark.parametrize("tool", ["hand", "ddp", "fsdp"])
def test_values_are_clipped_together(worlds, tool):
    for message, right in worlds(2).run(jobs.clipped_values, tool):
        assert ("got mixed torch.Tensor and DTensor" in message) == (tool != "fsdp")
        assert right


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected")
def test_torch_finds_no_nans_in_sharded_experts(worlds):
    for message in worlds(2).run(jobs.traced_for_nans):
        assert "_is_any_true" in message


@pytest.mark.parametrize("tool", ["hand", "ddp", "fsdp"])
def test_layers_made_on_meta(worlds, tool):
    with tokenferry.ExpertGroup(None, SHAPE) as group:
        want = {f"moe.{name}": value for name, value in Model(group, torch.float32).moe.state_dict().items()}
    for got in worlds(4).run(jobs.from_meta, tool):
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert torch.equal(got[name], value), name


def test_layers_are_compiled_and_checkpointed(worlds):
    for got in worlds(2).run(jobs.run_alone):
        for key, value in got.items():
            close(key, value, got[f"eager {key.split()[1]}"], 1e-12)


@pytest.mark.parametrize("tool", ["hand", "ddp"])
def test_second_derivatives(worlds, tool):
    want = jobs.differentiated_alone(2)
    for got in worlds(2).run(jobs.differentiated, tool):
        close("second", got, want, 1e-12)


def test_second_derivatives_of_experts_on_some_ranks(worlds):
    want = jobs.differentiated_alone(4)
    for got in worlds(4).run(jobs.differentiated, "ddp", 2):
        close("second", got, want, 1e-12)


def test_second_derivatives_under_fsdp_raise(worlds):
    """It has let go of the weights that it gathered."""
    for message in worlds(2).run(jobs.differentiated, "fsdp"):
        assert "storage of size 0" in message


HOWS = ("checkpointed", "reentrant", "wrapped", "experts again", "compiled")


def same(results):
    for want, got in results:
        all_close(got, want, 1e-12)


@pytest.mark.parametrize("how", [*HOWS, "generated", "generated in place"])
@pytest.mark.parametrize("tool", ["ddp", "fsdp"])
def test_models_under_a_tool_are_checkpointed_and_compiled(worlds, tool, how):
    same(worlds(2).run(jobs.run_otherwise, tool, how))


@pytest.mark.parametrize("how", ["checkpointed", "compiled", "generated"])
def test_models_with_experts_on_some_ranks_are_checkpointed_and_compiled(worlds, how):
    """Backward averages over the other ranks with the same experts, in compiled code, too."""
    same(worlds(4).run(jobs.run_otherwise, "ddp", how, 2))


def test_smaller_groups_need_to_know_who_has_the_same_experts(worlds):
    for rank, messages in enumerate(worlds(4).run(jobs.small_groups)):
        missing, dimensions, kind, placed, others, strangers = messages
        assert "replicate: the group of 'moe.0' has 2 of 4 ranks; pass the ranks that hold the same" in missing
        assert "replicate: expected one dimension, got [2, 2]" in dimensions
        assert "replicate: expected a mesh, a process group, False or None, got str" in kind
        assert "replicate: 'model' has a PlacedRouter" in placed
        assert "expected this rank and others outside of the group of 'moe.0', which hold the same" in others
        wrong = "hold different ones" if rank < 2 else "this rank is no member of the process group"
        assert wrong in strangers


@pytest.mark.parametrize("expert_ranks", [1, 2])
def test_biases_count_the_loads_of_all_ranks(worlds, expert_ranks):
    recipe = Recipe("ddp", expert_ranks=expert_ranks)
    want = jobs.balanced(0, None, recipe, 4)
    assert want.unique().numel() > 1
    for got in worlds(4).run(jobs.balanced, recipe, 4):
        assert torch.equal(got, want)


@pytest.mark.parametrize("tool", ["hand", "ddp", "fsdp"])
def test_biases_of_copies_are_equal_or_nothing_is_known_of_them(worlds, tool):
    want = jobs.balanced(0, None, Recipe(tool), 2)
    for untold, alone, shared in (results := worlds(2).run(jobs.biases_of_copies, tool)):
        assert "2 ranks may share its router, and the loads of 1 would be added up; tell parallelize" in untold
        assert torch.equal(shared, want)
        if tool != "hand":
            assert "2 ranks may share its router, and the loads of 1 would" in alone, "the tool has copied the router"
    if tool == "hand":
        assert not torch.equal(results[0][1], results[1][1]), "each has a model of its own"


def test_what_parallelize_keeps(worlds):
    worlds(2).run(jobs.kept_by_parallelize)


def test_experts_are_looked_after_once(worlds):
    """Programs call `parallelize` again, and each load would ask as often."""
    for counts in worlds(2).run(jobs.prepared_again):
        assert set(counts) == {1}


def test_what_was_to_be_ignored_before_still_is(worlds):
    assert worlds(2).run(jobs.ignored_before) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("tool", "scaler"),
    [("hand", GradScaler), ("ddp", GradScaler), ("fsdp", GradScaler), ("fsdp", torch.amp.GradScaler)],
    ids=lambda value: value if isinstance(value, str) else value.__module__.partition(".")[0],
)
def test_scaled_gradients(worlds, tool, scaler):
    """An infinity in an expert of one rank makes all ranks leave the step out."""
    for got in worlds(2).run(jobs.scaled, tool, scaler):
        assert got["half"].keys() == got["unscaled"].keys() == got["plain"].keys()
        for name, value in got["plain"].items():
            close(name, got["unscaled"][name], value, 1e-6)
            close(f"float16 {name}", got["half"][name], value, 0.05)
        assert got["kept"]
        assert got["scale"] == 8.0


@pytest.mark.parametrize("tool", ["hand", "ddp"])
def test_scaled_gradients_by_torch_alone_raise(worlds, tool):
    for message in worlds(2).run(jobs.scaled_together, tool):
        assert "no attribute 'placements'" in message
