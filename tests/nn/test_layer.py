"""MoELayer on one and on four ranks against DenseMoE, forward and backward."""

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

import tokenferry
from support.sharded import EXPERT_NAMES, local_parts
from tokenferry.nn import GELUExperts, GroupLimit, LayerOptions, MoELayer, Router, RouterOptions, parallelize
from tokenferry.testing.dense import DenseMoE
from tokenferry.types import MoeShape, Routing

EXPERTS, TOP_K, HIDDEN, FFN = 8, 3, 16, 12
TOKENS = (5, 0, 9, 6)


class Table(torch.nn.Module):
    """A router with a given choice and weights that are parameters: for -1, repeats and skew."""

    def __init__(self, topk_idx, topk_weights):
        super().__init__()
        self.topk_idx = topk_idx
        self.topk_weights = torch.nn.Parameter(topk_weights)

    def forward(self, x):
        return Routing(self.topk_idx, self.topk_weights)


@dataclass(frozen=True)
class Setup:
    """The inputs of all ranks; any process can make any part of them."""

    routing: str
    dtype: torch.dtype
    tokens: tuple[int, ...]

    def split(self, tensor):
        return tensor.split(self.tokens)

    def x(self):
        return self._random(HIDDEN, 0).to(self.dtype)

    def head(self):
        return self._random(HIDDEN, 1).to(self.dtype)

    def router(self, rank=None):
        """The router of one rank, or of all ranks' tokens."""
        if self.routing in ("softmax", "grouped"):
            router = Router(
                HIDDEN, EXPERTS, TOP_K, group_limit=GroupLimit(4, 2) if self.routing == "grouped" else None, seed=7
            )
            return router.double() if self.dtype == torch.float64 else router
        generator = torch.Generator().manual_seed(3)
        topk_idx = torch.randint(-1, EXPERTS, (sum(self.tokens), TOP_K), generator=generator)
        topk_idx[1::3] = -1
        if self.routing == "skewed":
            topk_idx = torch.where(topk_idx >= 0, 5, -1)
        weights = self._random(TOP_K, 2).float()
        return Table(
            *((topk_idx, weights) if rank is None else (self.split(topk_idx)[rank], self.split(weights)[rank]))
        )

    def _random(self, width, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(sum(self.tokens), width, dtype=torch.float64, generator=generator)


def run(module, x, head):
    """Run forward and backward; return every gradient by name."""
    x = x.clone().requires_grad_()
    out = module(x)
    (out * head).sum().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    named = {f"experts.{name}" if name in ("gate", "up", "down") else name: grad for name, grad in grads.items()}
    return {"out": out.detach(), "x": x.grad, **named}


def _layer(rank, pg, setup):
    shape = MoeShape(EXPERTS, TOP_K, HIDDEN, max_tokens=max(*setup.tokens, 1))
    with tokenferry.ExpertGroup(pg, shape) as group:
        layer = MoELayer(group, FFN, router=setup.router(rank), seed=11, dtype=setup.dtype)
        result = run(layer, setup.split(setup.x())[rank], setup.split(setup.head())[rank])
        return local_parts(result), local_parts(layer.state_dict()), layer.expert_counts


def assembled(results, setup):
    """Join the results of the ranks: rows and experts are concatenated, gradients of routers added up.

    The loss is a sum over ranks here; gradients of experts are those of the mean.
    """
    parts = {key: [result[key] for result, _, _ in results] for key in results[0][0]}
    joined = {key: sum(values) if key == "router.weight" else torch.cat(values) for key, values in parts.items()}
    return {key: value * len(results) if key in EXPERT_NAMES else value for key, value in joined.items()}


TOLERANCES = {
    # Gate weights and their gradients are float32 by contract; what depends on them agrees to its rounding only.
    torch.float64: {"tight": {"rtol": 1e-12, "atol": 1e-13}, "through weights": {"rtol": 2e-6, "atol": 1e-6}},
    torch.float32: {"tight": {"rtol": 1e-5, "atol": 1e-5}, "through weights": {"rtol": 1e-5, "atol": 2e-5}},
    torch.bfloat16: {"tight": {"rtol": 3e-2, "atol": 6e-2}, "through weights": {"rtol": 4e-2, "atol": 1e-1}},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ["softmax", "grouped", "table", "skewed"])
@pytest.mark.parametrize("tokens", [TOKENS, (7,), (0, 0, 0, 0)], ids=str)
def test_equals_dense(worlds, routing, dtype, tokens):
    setup = Setup(routing, dtype, tokens)
    results = [_layer(0, None, setup)] if len(tokens) == 1 else worlds(4).run(_layer, setup)
    dense = DenseMoE(setup.router(), [state for _, state, _ in results])
    want = run(dense, setup.x(), setup.head())
    got = assembled(results, setup)
    assert set(got) == set(want)
    for key, value in want.items():
        assert (got[key].dtype, got[key].shape) == (value.dtype, value.shape)
        through_weights = key.startswith("router") or (key == "x" and routing in ("softmax", "grouped"))
        kind = "through weights" if through_weights else "tight"
        torch.testing.assert_close(got[key], value, msg=lambda m, k=key: f"{k}: {m}", **TOLERANCES[dtype][kind])
    assert torch.equal(torch.cat([counts for _, _, counts in results]).long(), dense.expert_counts)


def test_one_seed_is_one_layer_whatever_the_ranks(worlds):
    setup = Setup("softmax", torch.float32, TOKENS)
    four = [state for _, state, _ in worlds(4).run(_layer, setup)]
    (_, one, _) = _layer(0, None, Setup("softmax", torch.float32, (7,)))
    for name in EXPERT_NAMES:
        assert torch.equal(torch.cat([state[name] for state in four]), one[name])
        assert one[name].unique().numel() > 0.99 * one[name].numel(), "experts must differ"
    assert all(torch.equal(state["router.weight"], one["router.weight"]) for state in four)


def _step_with_mean_loss(rank, pg, setup):
    """A mean loss over the ranks, as documented."""
    shape = MoeShape(EXPERTS, TOP_K, HIDDEN, max_tokens=max(setup.tokens))
    with tokenferry.ExpertGroup(pg, shape) as group:
        layer = MoELayer(group, FFN, router=setup.router(rank), seed=11, dtype=setup.dtype)
        loss = layer(setup.split(setup.x())[rank]).square().mean()
        loss.backward()
        for parameter in layer.replicated_parameters():
            torch.distributed.all_reduce(parameter.grad, group=pg)
            parameter.grad /= group.num_ranks
        return local_parts({name: p.grad for name, p in layer.named_parameters()}), local_parts(layer.state_dict())


def test_the_loss_scale_is_as_documented(worlds):
    setup = Setup("softmax", torch.float64, (5, 2, 9, 6))
    results = worlds(4).run(_step_with_mean_loss, setup)
    dense = DenseMoE(setup.router(), [state for _, state in results])
    torch.stack([part.square().mean() for part in setup.split(dense(setup.x()))]).mean().backward()
    for name in EXPERT_NAMES:
        got = torch.cat([grads[name] for grads, _ in results])
        torch.testing.assert_close(got, getattr(dense, name.removeprefix("experts.")).grad, rtol=1e-12, atol=1e-14)
    for grads, _ in results:
        torch.testing.assert_close(grads["router.weight"], dense.router.weight.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("capture", [False, True])
def test_compile(capture):
    group = tokenferry.ExpertGroup(None, MoeShape(4, 2, 16, max_tokens=6))
    layer = MoELayer(group, FFN)
    with torch._dynamo.config.patch(capture_scalar_outputs=capture):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=capture)
        for num_tokens in (6, 3):
            x, head = torch.randn(2, num_tokens, 16).unbind(0)
            want = run(layer, x, head)
            layer.zero_grad()
            got = run(compiled, x, head)
            layer.zero_grad()
            for key, value in want.items():
                torch.testing.assert_close(got[key if key in got else f"_orig_mod.{key}"], value)


def test_a_layer_has_these_names():
    layer = MoELayer(tokenferry.ExpertGroup(None, MoeShape(4, 2, 16, max_tokens=6)), FFN)
    names = {name for name in dir(layer) if not name.startswith("_")} - set(dir(nn.Module()))
    methods = {"expert_parameters", "replicated_parameters", "reset_parameters"}
    assert names == methods | {"group", "options", "experts", "router", "shared", "expert_counts"}


def test_leading_dimensions_and_bad_arguments():
    group = tokenferry.ExpertGroup(None, MoeShape(4, 2, 16, max_tokens=6))
    layer = MoELayer(group, FFN)
    x = torch.randn(2, 3, 16)
    out = layer(x)
    assert out.shape == x.shape
    assert torch.equal(out.view(6, 16), layer(x.view(6, 16)))
    torch.testing.assert_close(layer(x.transpose(0, 1)).transpose(0, 1), out)
    assert layer.expert_counts.sum() == 12
    assert {id(p) for p in layer.expert_parameters()} == {id(p) for p in layer.experts.parameters()}
    words = r"x: expected torch.float32 like the experts, got torch.float64; call .to\(torch.float32\)"
    with pytest.raises(tokenferry.ShapeError, match=words):
        layer(x.double())
    for wrong in (torch.randn(2, 8), torch.randn(2, 3, 17), torch.randn(())):
        words = rf"x: expected \[..., H\], got {re.escape(str(list(wrong.shape)))}; H=16 was set by the group"
        for run in (layer, torch.compile(layer, backend="eager")):
            with pytest.raises(tokenferry.ShapeError, match=words):
                run(wrong)
    with pytest.raises(tokenferry.CapacityError, match="T=7 rows exceed max_tokens=6"):
        layer(torch.randn(7, 16))
    with pytest.raises(tokenferry.ConfigError, match="ffn_hidden: expected a positive integer, got 0"):
        MoELayer(group, 0)
    for sizes in ((16, 2, 2), (8, 4, 2), (16, 4, 1)):
        with pytest.raises(tokenferry.ConfigError, match="router: it has num_experts="):
            MoELayer(group, 8, router=Router(*sizes))


class Returns(nn.Module):
    """Experts that return what a function makes of their rows."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, rows, offsets):
        return self.function(rows)


@pytest.mark.parametrize("function", [lambda rows: rows.mean(0, keepdim=True), lambda rows: rows[:, :8]])
def test_experts_return_a_row_for_each_row(function):
    group = tokenferry.ExpertGroup(None, MoeShape(4, 2, 16, 64), backend="cpu")
    with pytest.raises(tokenferry.ShapeError, match=r"experts: expected \[n, H\] = \[6, 16\] from them, got"):
        MoELayer(group, experts=Returns(function))(torch.randn(3, 16))


def test_what_modules_return_need_not_be_contiguous():
    group = tokenferry.ExpertGroup(None, MoeShape(4, 2, 16, 64), backend="cpu")

    def router(x):
        return tokenferry.Routing(torch.tensor([0, 3]).expand(len(x), 2), torch.ones(2).expand(len(x), 2))

    x = torch.randn(3, 16)
    layer = MoELayer(group, experts=Returns(lambda rows: (torch.eye(16) @ rows.T).T), router=router)
    torch.testing.assert_close(layer(x), 2 * x)


def test_routers_return_weights():
    group = tokenferry.ExpertGroup(None, MoeShape(4, 2, 16, 64), backend="cpu")
    for found in (tokenferry.Routing(torch.zeros(3, 2, dtype=torch.int64)), None):
        layer = MoELayer(group, 8, router=lambda _, found=found: found)
        with pytest.raises(tokenferry.ShapeError, match=r"expected a .*Routing with topk_weights from it"):
            layer(torch.randn(3, 16))


def test_gradients_of_several_passes_at_once_are_refused():
    group = tokenferry.ExpertGroup(None, MoeShape(4, 2, 16, 64), backend="cpu")
    layer = MoELayer(group, 8)
    for _ in range(2):
        with pytest.raises(tokenferry.UnsupportedError, match="gradients of several backward passes at once"):
            torch.autograd.functional.jacobian(layer, torch.randn(2, 16), vectorize=True)
    assert layer(torch.randn(2, 16)).shape == (2, 16)


def load_whole(rank, pg):
    group = tokenferry.ExpertGroup(pg, MoeShape(4, 2, 16, 64), backend="cpu")
    layer = MoELayer(group, 8)
    whole = {name: getattr(value, "full_tensor", value.clone)() for name, value in layer.state_dict().items()}
    for assign in (False, True):
        with pytest.raises(tokenferry.ConfigError, match=r"experts\.gate is a plain tensor.*set_model_state_dict"):
            layer.load_state_dict(whole, assign=assign)
    x = torch.randn(3, 16)
    want = layer(x)
    torch.nn.init.zeros_(layer.experts.gate)
    set_model_state_dict(layer, whole, options=StateDictOptions(full_state_dict=True))
    torch.testing.assert_close(layer(x), want)


def test_whole_experts_are_not_taken_for_a_part(worlds):
    worlds(2).run(load_whole)


def load_what_rank_0_saved(rank: int, pg: Any, path: str) -> None:
    """As many programs do it: rank 0 calls `torch.save`, and all ranks `torch.load`."""
    group = tokenferry.ExpertGroup(pg, MoeShape(4, 2, 16, 64), backend="cpu")
    model = torch.nn.Sequential(MoELayer(group, 8, seed=1))
    if rank == 0:
        torch.save(model.state_dict(), path)
    dist.barrier(pg)
    state, kept = torch.load(path, weights_only=False), model[0].experts.gate.to_local().clone()
    if rank == 0:
        model.load_state_dict(state)
    else:
        text = rf"0\.experts\.gate holds the experts of the rank at .0.*, and this one is at .{rank}.*\.checkpoint"
        with pytest.raises(tokenferry.ConfigError, match=text):
            model.load_state_dict(state)
    assert torch.equal(model[0].experts.gate.to_local(), kept)
    own = f"{path}.{rank}"
    torch.save(model.state_dict(), own)
    torch.nn.init.zeros_(model[0].experts.gate)
    model.load_state_dict(torch.load(own, weights_only=False))  # what a rank has saved for itself
    assert torch.equal(model[0].experts.gate.to_local(), kept)


def test_experts_of_another_rank_are_refused(worlds, tmp_path):
    worlds(2).run(load_what_rank_0_saved, str(tmp_path / "state"))


class Within(nn.Module):
    """Experts in a module of their own."""

    def __init__(self, group: tokenferry.ExpertGroup) -> None:
        super().__init__()
        self.inner = GELUExperts(group, 8)

    def forward(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.inner(rows, offsets)


def load_parts_that_rank_0_saved(rank: int, pg: Any, path: str) -> None:
    """Into each module of the experts, and over a mesh that differs by its name."""
    group = tokenferry.ExpertGroup(pg, MoeShape(4, 2, 16, 64), backend="cpu")
    for named in (False, True):
        saved, layer = (MoELayer(group, experts=Within(group)) for _ in range(2))
        if named:
            parallelize(saved, init_device_mesh("cpu", (2,), mesh_dim_names=("experts",)))
        for name, part in (("", layer), ("experts.", layer.experts), ("experts.inner.", layer.experts.inner)):
            if rank == 0:
                torch.save(saved.get_submodule(name.strip(".")).state_dict(), path)
            dist.barrier(pg)
            state, kept = torch.load(path, weights_only=False), layer.experts.inner.up.to_local().clone()
            if rank:
                missing = "experts.inner.".removeprefix(name)
                with pytest.raises(tokenferry.ConfigError, match=rf": {missing}up holds the experts of the rank at .0"):
                    part.load_state_dict(state, assign=named)
                assert torch.equal(layer.experts.inner.up.to_local(), kept)
            else:
                part.load_state_dict(state, assign=named)
            dist.barrier(pg)
        layer.load_state_dict(saved.state_dict(), assign=named)  # of this rank
        assert torch.equal(layer.experts.inner.up.to_local(), saved.experts.inner.up.to_local())
        layer(torch.randn(3, 16))


def test_experts_of_another_rank_are_refused_by_each_part_and_over_each_mesh(worlds, tmp_path):
    worlds(2).run(load_parts_that_rank_0_saved, str(tmp_path / "state"))


def add_late(rank: int, pg: Any) -> None:
    """A parameter of the experts that came after the layer, and what helps."""
    group = tokenferry.ExpertGroup(pg, MoeShape(4, 2, 16, 64), backend="cpu")
    layer, x = MoELayer(group, 8), torch.randn(3, 16)
    layer.experts.scale = nn.Parameter(torch.ones(group.num_local_experts))
    for run in (layer, torch.compile(layer, backend="eager")):
        with pytest.raises(tokenferry.ConfigError, match=r"experts: scale is no DTensor .* parallelize\(model, mesh\)"):
            run(x)
    parallelize(layer, init_device_mesh("cpu", (2,)))
    layer(x)
    assert layer.experts.scale.shape == (4,)


def test_parameters_that_come_late_are_named(worlds):
    worlds(2).run(add_late)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Router(16, 4, 5), "top_k: expected 1 .. 4, got 5"),
        (lambda: Router(0, 4, 2), "hidden: expected a positive integer, got 0"),
        (lambda: Router(16, 4, 2, group_limit=GroupLimit(3, 1)), "num_groups=3 does not divide E=4"),
        (lambda: Router(16, 4, 3, group_limit=GroupLimit(2, 1)), "top_k: expected 1 .. 2, got 3"),
        (lambda: Router(16, 4, 2, group_limit=(1, 1)), "group_limit: expected a tokenferry.nn.GroupLimit or None"),
        (lambda: GroupLimit(2.0, 1), "num_groups: expected a positive integer, got 2.0"),
        (lambda: LayerOptions(dispatch=None), "dispatch: expected a tokenferry.DispatchOptions, got NoneType"),
        (lambda: RouterOptions(capacity_factor="x"), "capacity_factor: expected a positive number or None, got 'x'"),
        (lambda: RouterOptions(capacity_factor=True), "capacity_factor: expected a positive number or None, got True"),
        (lambda: MoELayer(None, 8), "group: expected a tokenferry.ExpertGroup, got NoneType"),
    ],
)
def test_what_can_never_work_is_refused_when_it_is_made(make, message):
    with pytest.raises(tokenferry.ConfigError, match=re.escape(message)):
        make()


def test_results_are_no_views():
    """Schedules of pipelines detach the results of a stage in place."""
    with tokenferry.ExpertGroup(None, MoeShape(4, 2, 8, 16), backend="cpu") as group:
        layer = MoELayer(group, 16)
        assert not layer(torch.randn(3, 8))._is_view()
        assert layer(torch.randn(2, 3, 8)).shape == (2, 3, 8)


def test_experts_in_a_wrapper_that_repeats_them_are_refused():
    """In backward it would call them without what functional_call has given them."""
    with tokenferry.ExpertGroup(None, MoeShape(4, 2, 8, 16), backend="cpu") as group:
        layer = MoELayer(group, 16)
        with pytest.raises(tokenferry.ConfigError, match="checkpoint_experts=True"):
            MoELayer(group, experts=checkpoint_wrapper(GELUExperts(group, 16)))
        layer.experts = checkpoint_wrapper(layer.experts)
        with pytest.raises(tokenferry.ConfigError, match="checkpoint_experts=True"):
            layer(torch.randn(3, 8))
        with pytest.raises(tokenferry.ConfigError, match="checkpoint_experts: expected a bool, got 1"):
            LayerOptions(checkpoint_experts=1)


def test_parameters_with_hooks_are_not_replaced(worlds):
    for message in worlds(2).run(experts_with_hooks):
        assert "MoELayer: experts: up: has hooks" in message


def experts_with_hooks(rank, pg) -> str:
    """Make a layer of experts with a hook, which their parameters would lose."""
    with tokenferry.ExpertGroup(pg, MoeShape(4, 2, 8, 16), backend="cpu") as group:
        experts = GELUExperts(group, 16)
        experts.up.register_hook(torch.neg)
        with pytest.raises(tokenferry.ConfigError) as caught:
            MoELayer(group, experts=experts)
        return str(caught.value)
