"""Auxiliary losses, capacity, and biases without an auxiliary loss: in one process, and over ranks by one rule."""

import copy
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tokenferry
from support import balancing_jobs as jobs
from support.experts_jobs import stepped
from tokenferry import MoeShape
from tokenferry.nn import (
    GroupLimit,
    MoELayer,
    Router,
    RouterOptions,
    auxiliary_losses,
    load_balance_loss,
    softmax_topk,
    update_biases,
    z_loss,
)
from tokenferry.nn.capacity import limited

SHAPE = MoeShape(num_experts=4, top_k=2, hidden=16, max_tokens=32)
LOSSES = RouterOptions(losses=True)


@pytest.fixture
def group():
    with tokenferry.ExpertGroup(None, SHAPE, backend="cpu") as one:
        yield one


def random(*sizes, seed=0):
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- values


def balance_reference(probabilities, topk_idx):
    num_experts = len(probabilities[0])
    tokens = [t for t, chosen in enumerate(topk_idx) if max(chosen) >= 0]
    flat = [e for chosen in topk_idx for e in chosen if e >= 0]
    return num_experts * sum(
        flat.count(e) / len(flat) * sum(probabilities[t][e] for t in tokens) / len(tokens) for e in range(num_experts)
    )


def test_load_balance_loss():
    probabilities = random(7, 4).softmax(1).requires_grad_()
    topk_idx = torch.tensor([[0, 1], [0, 2], [-1, -1], [3, -1], [0, 1], [2, 0], [0, 3]])
    loss = load_balance_loss(probabilities, topk_idx)
    assert loss.item() == pytest.approx(balance_reference(probabilities.tolist(), topk_idx.tolist()), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, probabilities)
    assert not gradient[2].any()
    assert torch.autograd.gradcheck(lambda p: load_balance_loss(p, topk_idx), probabilities)


def test_its_extremes():
    """1 if balanced; E / K if all tokens are sure of the same experts; 0 without tokens."""
    even = torch.full((4, 4), 0.25)
    assert load_balance_loss(even, torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3]])).item() == 1.0
    sure = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 3)
    assert load_balance_loss(sure, torch.tensor([[0, 1]] * 3, dtype=torch.int32)).item() == 2.0
    for tokens in (even[:0].requires_grad_(), even.clone().requires_grad_()):
        loss = load_balance_loss(tokens, torch.full((len(tokens), 2), -1))
        loss.backward()
        assert (loss.item(), tokens.grad.count_nonzero().item()) == (0.0, 0)


def test_z_loss():
    logits = random(5, 4)
    logits[1] = -math.inf
    logits[2, :3] = -math.inf
    logits.requires_grad_()
    loss = z_loss(logits)
    rows = [row for t, row in enumerate(logits.tolist()) if t != 1]
    assert loss.item() == pytest.approx(sum(math.log(sum(map(math.exp, row))) ** 2 for row in rows) / 4, rel=1e-12)
    loss.backward()
    assert logits.grad.isfinite().all()
    assert torch.autograd.gradcheck(z_loss, random(5, 4).requires_grad_())
    assert z_loss(torch.zeros(0, 4)).item() == 0.0
    many = torch.full((100_000, 1), 1.5, dtype=torch.float16)
    assert (z_loss(many).item(), z_loss(many).dtype) == (2.25, torch.float16), "the sum is more than float16 holds"


# ---------------------------------------------------------------------- routers and layers with losses


@pytest.mark.parametrize("limit", [None, GroupLimit(2, 1)], ids=["softmax", "sigmoid"])
def test_a_router_has_the_losses_of_its_logits(limit):
    router, x = Router(16, 4, 2, group_limit=limit, options=LOSSES).double(), random(6, 16)
    routing = router(x)
    logits = x @ router.weight.T
    scores = logits.softmax(1) if limit is None else logits.sigmoid() / logits.sigmoid().sum(1, keepdim=True)
    losses = auxiliary_losses(router)
    torch.testing.assert_close(losses.balance, load_balance_loss(scores, routing.topk_idx), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.z, z_loss(logits), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tool", ["hand", "fsdp"])
def test_ranks_follow_the_rule_of_gradients(worlds, tool):
    """Losses and gradients are those of the mean over ranks of the ranks' losses, auxiliary ones included."""
    want = jobs.trained_alone(2)
    for got in worlds(2).run(jobs.trained, tool):
        assert got.keys() == want.keys()
        assert want["biases"].any()
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def losses_of(layer, out):
    losses = auxiliary_losses(layer)
    return out.square().mean() + 0.1 * losses.balance + 0.01 * losses.z


def gradients(layer, out):
    losses_of(layer, out).backward()
    found = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    return found


def regulated(group):
    options = RouterOptions(losses=True, capacity_factor=1.25)
    return MoELayer(group, 24, router=Router(16, 4, 2, group_limit=GroupLimit(2, 1), options=options))


@pytest.mark.parametrize("how", ["checkpointed", "compiled", "autocast"])
def test_losses_do_not_depend_on_how_a_layer_runs(group, how):
    layer, x = regulated(group), random(12, 16).float()
    want = gradients(layer, layer(x))
    bare = stepped(MoELayer(group, 24, router=Router(16, 4, 2, group_limit=GroupLimit(2, 1))), x)["router.weight"]
    assert not torch.allclose(want["router.weight"], bare)
    load, layer._load = layer._load, None
    assert layer.router.dropped.item() > 0
    if how == "checkpointed":
        out = checkpoint(layer, x, use_reentrant=False)
    elif how == "compiled":
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            out = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
    got = gradients(layer, out.float())
    for name, value in want.items():
        tolerance = {"rtol": 5e-2, "atol": 5e-2} if how == "autocast" else {"rtol": 1e-6, "atol": 1e-8}
        torch.testing.assert_close(got[name], value, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
    assert torch.equal(layer._load, load), "a repeated pass was counted"
    assert layer.router.losses is None, "a repeated pass left its graph behind"


def test_models_with_losses_can_be_copied(group):
    layer = regulated(group)
    out = layer(random(3, 16).float())
    other = copy.deepcopy(layer)
    assert other.router.losses is None
    losses_of(layer, out).backward()
    for name, value in other.state_dict().items():
        assert torch.equal(value, layer.state_dict()[name])


def test_losses_that_are_not_there(group):
    layer, x = regulated(group), random(3, 16).float()
    with pytest.raises(
        tokenferry.ConfigError, match=r"expected a Router with RouterOptions\(losses=True\), found none"
    ):
        auxiliary_losses(MoELayer(group, 24))
    with pytest.raises(tokenferry.ConfigError, match="'router' has no losses; call forward before"):
        auxiliary_losses(layer)
    out = layer(x)
    losses_of(layer, out)
    with pytest.raises(tokenferry.ConfigError, match="'router' has no losses; call forward before"):
        auxiliary_losses(layer)
    checkpoint(layer, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(tokenferry.ConfigError, match=r"have no gradients, .* use use_reentrant=False"):
        auxiliary_losses(layer)
    with torch.no_grad():
        assert auxiliary_losses(layer).z > 0


# ---------------------------------------------------------------------- capacity


def capacity_reference(topk_idx, num_experts, factor):
    """Plain loops: slot by slot, then token by token."""
    tokens, top_k = len(topk_idx), len(topk_idx[0])
    most, counts = math.ceil(factor * tokens * top_k / num_experts), [0] * num_experts
    kept = [row[:] for row in topk_idx]
    for k in range(top_k):
        for t in range(tokens):
            expert = topk_idx[t][k]
            if expert >= 0:
                kept[t][k] = expert if counts[expert] < most else -1
                counts[expert] += 1
    return kept


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 1.3, 4.0])
@pytest.mark.parametrize("num_tokens", [1, 7, 32])
def test_capacity(factor, num_tokens):
    x = random(num_tokens, 16) + 1.0
    free = Router(16, 8, 3).double()
    router = Router(16, 8, 3, options=RouterOptions(capacity_factor=factor)).double()
    want, got = free(x), router(x)
    kept = capacity_reference(want.topk_idx.tolist(), 8, factor)
    assert got.topk_idx.tolist() == kept
    stays = got.topk_idx >= 0
    assert torch.equal(got.topk_weights, want.topk_weights.where(stays, 0.0))
    assert router.dropped.item() == (~stays).sum().item()
    assert (free.dropped, router.losses) == (None, None)


def test_slots_that_are_unused_take_no_place_and_are_not_dropped():
    unused = -math.inf
    logits = torch.tensor([[9.0, unused, unused, unused], [9.0, 1.0, 0.0, unused], [1.0, 9.0, 0.0, unused]])
    kept = limited(softmax_topk(logits, 2), 4, 0.5)  # 0.75 of a slot, rounded up
    assert kept.routing.topk_idx.tolist() == [[0, -1], [-1, -1], [1, -1]]
    assert kept.dropped.item() == 3


def test_no_tokens_and_gradients_of_what_stays():
    router = Router(16, 4, 2, options=RouterOptions(losses=True, capacity_factor=0.2)).double()
    assert router(random(0, 16)).topk_idx.shape == (0, 2)
    assert (router.dropped.item(), router.losses.balance.item(), router.losses.z.item()) == (0, 0.0, 0.0)
    x = random(9, 16).requires_grad_()
    routing = router(x)
    gone = (routing.topk_idx < 0).all(1)
    assert gone.any()
    assert not gone.all()
    (gradient,) = torch.autograd.grad((routing.topk_weights * random(9, 2)).sum(), x)
    assert not gradient[gone].any()
    assert gradient[~gone].any()


def test_tokens_that_are_dropped_get_nothing(group):
    layer = MoELayer(group, 24, router=Router(16, 4, 2, options=RouterOptions(capacity_factor=0.01)))
    x = random(9, 16).float()
    out = layer(x)
    gone = (layer.router(x).topk_idx < 0).all(1)
    assert gone.sum() >= 5
    assert not out[gone].any()
    assert layer.expert_counts.sum() == 18 - layer.router.dropped


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_a_capacity_that_is_none(factor):
    with pytest.raises(tokenferry.ConfigError, match="capacity_factor: expected a positive number or None"):
        RouterOptions(capacity_factor=factor)


# ---------------------------------------------------------------------- biases


def test_biases_follow_the_loads_of_training(group):
    router = Router(16, 4, 2, group_limit=GroupLimit(1, 1))
    layer = MoELayer(group, 24, router=router)
    total = torch.zeros(4, dtype=torch.int64)
    for seed in (0, 1):
        layer(random(9, 16, seed=seed).float())
        total += layer.expert_counts
    layer.eval()(random(9, 16, seed=2).float())
    want = copy.deepcopy(router)
    want.update_bias(total, rate=0.25)
    update_biases(layer, rate=0.25)
    assert torch.equal(router.bias, want.bias)
    update_biases(layer, rate=0.25)
    assert torch.equal(router.bias, want.bias), "old loads were taken again"
    with pytest.raises(tokenferry.ConfigError, match="expected a MoELayer whose router has a bias, found none"):
        update_biases(MoELayer(group, 24))
