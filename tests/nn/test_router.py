"""The gatings against plain loops over Python numbers, their ties, their gradients, and the bias update."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import tokenferry
from support.ambient import default_dtype
from tokenferry.nn import GroupLimit, Router, group_limited_topk, load_balance_loss, softmax_topk
from tokenferry.nn.capacity import limited


def best(scores, count):
    """Indices of the ``count`` largest, the lower index first among equals."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def softmax_reference(logits, top_k, normalize):
    total = sum(math.exp(v) for v in logits)
    chosen = best(logits, top_k)
    weights = [math.exp(logits[e]) / total for e in chosen]
    return chosen, [w / sum(weights) for w in weights] if normalize else weights


def group_reference(logits, top_k, num_groups, top_groups, bias, scale):
    scores = [1 / (1 + math.exp(-v)) for v in logits]
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    width = len(logits) // num_groups
    value = [sum(sorted(biased[g * width : (g + 1) * width], reverse=True)[:2]) for g in range(num_groups)]
    allowed = best(value, top_groups)
    chosen = best([b if i // width in allowed else -math.inf for i, b in enumerate(biased)], top_k)
    return chosen, [scores[e] / sum(scores[c] for c in chosen) * scale for e in chosen]


def random_logits(num_experts, *, ties):
    generator = torch.Generator().manual_seed(num_experts)
    logits = torch.randn(40, num_experts, dtype=torch.float64, generator=generator) * 2
    return logits.round() if ties else logits


def compare(routing, logits, reference):
    assert routing.topk_idx.dtype == torch.int64
    assert routing.topk_weights.dtype == torch.float32
    for token, row in enumerate(logits.tolist()):
        chosen, weights = reference(row)
        assert routing.topk_idx[token].tolist() == chosen
        assert routing.topk_weights[token].tolist() == pytest.approx(weights, rel=1e-6)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 2), (24, 8), (6, 6)])
def test_softmax_topk(num_experts, top_k, ties):
    logits = random_logits(num_experts, ties=ties)
    for normalize in (True, False):
        routing = softmax_topk(logits, top_k, normalize=normalize)
        compare(routing, logits, lambda row, n=normalize: softmax_reference(row, top_k, n))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_groups", "top_groups", "scale"),
    [(16, 4, 4, 2, 1.0), (24, 8, 8, 4, 2.5), (8, 2, 1, 1, 1.0), (6, 2, 6, 3, 1.0), (8, 4, 4, 2, 16.0)],
)
def test_group_limited_topk(num_experts, top_k, num_groups, top_groups, scale, ties):
    logits = random_logits(num_experts, ties=ties)
    # Quarters: sums of equal scores and biases are equal in Python, too. They move the choice, and the group's rank.
    bias = torch.randint(-4, 5, (num_experts,), generator=torch.Generator().manual_seed(1)).double() / 4
    for given in (bias, None):
        routing = group_limited_topk(logits, top_k, GroupLimit(num_groups, top_groups), bias=given, scale=scale)
        zero = [0.0] * num_experts
        values = zero if given is None else given.tolist()
        compare(routing, logits, lambda row, b=values: group_reference(row, top_k, num_groups, top_groups, b, scale))


def test_the_bias_moves_the_choice_and_not_the_weights():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    bias = torch.tensor([9.0, 0.0, 0.0, 0.0])
    routing = group_limited_topk(logits, 2, GroupLimit(1, 1), bias=bias)
    assert routing.topk_idx.tolist() == [[0, 3]]
    scores = [0.5, 1 / (1 + math.exp(-3))]
    assert routing.topk_weights[0].tolist() == pytest.approx([s / sum(scores) for s in scores])


def test_scores_that_underflow_give_weights_of_zero_and_finite_gradients():
    logits = torch.full((1, 4), -200.0, requires_grad=True)
    routing = group_limited_topk(logits, 2, GroupLimit(2, 1))
    assert routing.topk_weights.tolist() == [[0.0, 0.0]]
    routing.topk_weights.sum().backward()
    assert logits.grad.isfinite().all()


GATINGS = {
    "softmax": lambda logits: softmax_topk(logits, 2),
    "raw softmax": lambda logits: softmax_topk(logits, 2, normalize=False),
    "sigmoid": lambda logits: group_limited_topk(logits, 2, GroupLimit(1, 1)),
    "groups": lambda logits: group_limited_topk(logits, 2, GroupLimit(2, 1), bias=torch.tensor([5.0, 0, 0, 0])),
}
INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("gate", GATINGS.values(), ids=GATINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_minus_infinity_masks_experts(gate, dtype):
    """Masked experts are never chosen, a row of nothing else goes nowhere, and gradients stay finite."""
    rows = [[-INF] * 4, [-INF, -INF, -INF, 1], [-INF, -300, 2, -INF], [0.0, 1, 2, 3]]
    logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
    routing = gate(logits)
    assert [sorted(row) for row in routing.topk_idx[:2].tolist()] == [[-1, -1], [-1, 3]]
    assert 0 not in routing.topk_idx[:3]
    weights = routing.topk_weights
    assert weights[0].tolist() == [0.0, 0.0]
    assert weights[1, 1] == 0
    assert weights[1, 0] > 0.4  # raw scores of a single expert: 1 of softmax
    assert weights[3].gt(0).all()
    (weights * torch.tensor([1.0, 3.0])).sum().backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[0].any()
    assert logits.grad[3].any()


def test_experts_that_are_masked_do_not_take_the_place_of_unlikely_ones():
    routing = softmax_topk(torch.tensor([[-INF, 0.0, -INF, -300.0]]), 2)  # whose probability rounds to 0
    assert routing.topk_idx.tolist() == [[1, 3]]


def test_a_group_is_scored_by_its_experts_that_are_not_masked():
    """Group 0 has one good expert, group 1 none, group 2 two bad ones."""
    logits = torch.tensor([[9.0, -INF, -INF, -INF, -4.0, -4.0]])
    assert group_limited_topk(logits, 2, GroupLimit(3, 1)).topk_idx.tolist() == [[0, -1]]
    assert group_limited_topk(logits, 3, GroupLimit(3, 2)).topk_idx.tolist() == [[0, 4, 5]]
    assert group_limited_topk(logits, 5, GroupLimit(3, 3)).topk_idx.tolist() == [[0, 4, 5, -1, -1]]


@pytest.mark.parametrize("gate", GATINGS.values(), ids=GATINGS)
@pytest.mark.parametrize("row", [[NAN, 0.0, 1.0, 2.0], [NAN, -INF, -INF, -INF], [NAN] * 4], ids=str)
def test_a_nan_stays_visible(gate, row):
    routing = gate(torch.tensor([row, [0.0, 1, 2, 3]]))
    assert routing.topk_weights[0].isnan().any()
    assert routing.topk_weights[1].isfinite().all()


def test_infinity_stays_visible_in_softmax():
    assert softmax_topk(torch.tensor([[0.0, INF, 0.0]]), 2).topk_weights.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_narrow_logits_are_computed_in_float32(dtype):
    logits = random_logits(16, ties=False).to(dtype)
    for gate in (lambda v: softmax_topk(v, 4), lambda v: group_limited_topk(v, 4, GroupLimit(4, 2))):
        got, want = gate(logits), gate(logits.float())
        assert torch.equal(got.topk_idx, want.topk_idx)
        assert torch.equal(got.topk_weights, want.topk_weights)


@pytest.mark.parametrize("limit", [None, GroupLimit(4, 2)])
def test_gradients_reach_rows_and_weight(limit):
    router = Router(4, 16, 3, group_limit=limit, scale=1.0 if limit is None else 2.5).double()
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    head = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(x, weight):
        routing = torch.func.functional_call(router, {"weight": weight}, (x,))
        return (routing.topk_weights.double() * head).sum()

    weight = router.weight.detach().clone().requires_grad_()
    # Weights are float32: steps and tolerances that its rounding allows.
    assert torch.autograd.gradcheck(loss, (x, weight), eps=1e-3, atol=2e-4, rtol=1e-3)


def test_routers_of_one_seed_are_equal_and_deterministic():
    one, two, other = Router(8, 16, 4, seed=5), Router(8, 16, 4, seed=5), Router(8, 16, 4, seed=6)
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, other.weight)
    x = torch.randn(64, 8)
    assert torch.equal(one(x).topk_idx, two(x).topk_idx)
    assert one(x[:0]).topk_idx.shape == (0, 4)


@pytest.mark.parametrize("limit", [None, GroupLimit(4, 2)])
def test_narrow_rows_are_routed_in_float32(limit):
    router = Router(32, 16, 4, group_limit=limit)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    got, want = router(x), router(x.float())
    assert torch.equal(got.topk_idx, want.topk_idx)
    assert torch.equal(got.topk_weights, want.topk_weights)


def test_update_bias_follows_the_load():
    router = Router(8, 4, 2, group_limit=GroupLimit(2, 1))
    router.update_bias(torch.tensor([7, 1, 4, 4], dtype=torch.int32), rate=0.25)
    assert router.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    router.update_bias(torch.tensor([0, 0, 8, 0]))
    assert router.bias.tolist() == pytest.approx([-0.249, 0.251, -0.001, 0.001])
    assert not router.bias.requires_grad
    assert "bias" in router.state_dict()


@pytest.mark.parametrize("cast", ["bfloat16", "half", "float", "double"])
def test_a_bias_is_never_narrower_than_float32(cast):
    """Steps of 0.001 would be lost from 0.5 on in bfloat16."""
    router = Router(8, 4, 2, group_limit=GroupLimit(1, 1))
    router.bias.fill_(1.0 + 2**-20)
    model = torch.nn.Sequential(router, torch.nn.Linear(8, 8))
    getattr(model, cast)()
    assert model[1].weight.dtype == router.weight.dtype
    assert router.bias.dtype == (torch.float64 if cast == "double" else torch.float32)
    assert router.bias[0].item() == 1.0 + 2**-20
    assert router.state_dict()["bias"] is not None
    assert router.to("meta").bias.is_meta


@pytest.mark.parametrize("way", ["assign", "by hand"])
def test_a_bias_that_came_narrow_keeps_its_steps(way):
    router = Router(hidden=4, num_experts=4, top_k=2, group_limit=GroupLimit(1, 1))
    narrow = torch.full((4,), 0.5, dtype=torch.bfloat16)
    if way == "assign":
        router.load_state_dict({"weight": router.weight.detach().bfloat16(), "bias": narrow}, assign=True)
        assert router.bias.dtype == torch.float32
    else:
        router.bias = narrow
    for _ in range(3):
        router.update_bias(torch.tensor([1, 3, 3, 3]))
    torch.testing.assert_close(router.bias, torch.tensor([0.503, 0.497, 0.497, 0.497]))


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2

    def right_inverse(self, weight):
        return weight * 2


def test_the_original_of_a_parametrized_weight_is_drawn():
    router = Router(hidden=8, num_experts=4, top_k=2)
    want = router.weight.detach().clone()
    parametrize.register_parametrization(router, "weight", Half())
    with torch.no_grad():
        router.parametrizations.weight.original.fill_(7.0)
    router.reset_parameters()
    assert torch.equal(router.parametrizations.weight.original, want)
    router = parametrizations.weight_norm(Router(hidden=8, num_experts=4, top_k=2))
    with pytest.raises(tokenferry.ConfigError, match="weight is no parameter any more, nor computed from one tensor"):
        router.reset_parameters()


def test_update_bias_balances_a_skewed_load():
    generator = torch.Generator().manual_seed(0)
    router = Router(8, 8, 2, group_limit=GroupLimit(1, 1), seed=3)
    x = torch.randn(512, 8, generator=generator) + 1.0  # a common direction: some experts are liked by all

    def load():
        return torch.bincount(router(x).topk_idx.flatten(), minlength=8)

    before = load().max()
    for _ in range(200):
        router.update_bias(load(), rate=0.01)
    assert load().max() < 0.6 * before
    assert load().max() < 1.5 * 512 * 2 / 8


LOGITS = torch.zeros(3, 8)
BAD_CALLS = (
    (lambda: softmax_topk(LOGITS[0], 2), tokenferry.ShapeError, r"logits: expected floating point \[T, E\], got"),
    (lambda: softmax_topk(LOGITS.long(), 2), tokenferry.ShapeError, "logits: .* torch.int64"),
    (lambda: softmax_topk(LOGITS, 9), tokenferry.ConfigError, r"top_k: expected 1 \.\. 8, got 9"),
    (lambda: group_limited_topk(LOGITS, 2, GroupLimit(3, 1)), tokenferry.ConfigError, "does not divide E=8"),
    (lambda: GroupLimit(0, 1), tokenferry.ConfigError, "num_groups: .* got 0"),
    (lambda: GroupLimit(4, 5), tokenferry.ConfigError, "top_groups: .* got 5"),
    (lambda: group_limited_topk(LOGITS, 5, GroupLimit(4, 2)), tokenferry.ConfigError, r"top_k: .* 1 \.\. 4"),
    (
        lambda: group_limited_topk(LOGITS, 2, GroupLimit(4, 2), bias=torch.zeros(4)),
        tokenferry.ShapeError,
        r"bias: expected \[E\] = \[8\], got \[4\]",
    ),
    (lambda: Router(8, 8, 2, scale=2.0), tokenferry.ConfigError, "scale=2.0 needs group_limit"),
    (lambda: Router(8, 8, 2, seed=-1), tokenferry.ConfigError, "seed: .* got -1"),
    (lambda: Router(8, 8, 2).update_bias(torch.zeros(8)), tokenferry.ConfigError, "has no bias"),
    (
        lambda: Router(8, 8, 2, group_limit=GroupLimit(1, 1)).update_bias(torch.zeros(4)),
        tokenferry.ShapeError,
        r"got \[4\]; gather",
    ),
)


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS, ids=[message for _, _, message in BAD_CALLS])
def test_bad_calls_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_limit_of_groups_says_why_a_token_may_choose_no_more():
    why = "expected 1 .. 2, got 4: 2 of 4 groups have 2 of the 4 experts; choose fewer experts, or allow more groups"
    with pytest.raises(tokenferry.ConfigError, match=re.escape(f"Router: top_k: {why}")):
        Router(16, 4, 4, group_limit=GroupLimit(4, 2))
    with pytest.raises(tokenferry.ConfigError, match=re.escape(f"group_limited_topk: top_k: {why}")):
        group_limited_topk(torch.zeros(2, 4), 4, GroupLimit(4, 2))
    with pytest.raises(tokenferry.ConfigError, match=r"top_k: expected 1 \.\. 4, got 5$"):
        Router(16, 4, 5, group_limit=GroupLimit(2, 2))


@pytest.mark.parametrize("top_k", [0, 5, 2.0, "2", True])
def test_a_number_of_experts_that_is_none(top_k):
    with pytest.raises(tokenferry.ConfigError, match=re.escape(f"top_k: expected 1 .. 4, got {top_k!r}")):
        softmax_topk(torch.zeros(2, 4), top_k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_loss_of_balance_counts_in_a_wide_dtype(dtype):
    """Narrow ones cannot count as far as there are tokens: float16 ends at 65504, bfloat16 at 256."""
    tokens = 100_000
    probabilities = torch.full((tokens, 4), 0.25, dtype=dtype)
    even = torch.arange(tokens)[:, None] % 4
    assert load_balance_loss(probabilities, even).item() == 1.0
    to_one = torch.tensor([1.0, 0, 0, 0]).to(dtype).repeat(tokens, 1)
    loss = load_balance_loss(to_one, torch.zeros_like(even))
    assert (loss.item(), loss.dtype) == (4.0, dtype)


def test_the_default_dtype_does_not_change_what_is_dropped():
    logits = torch.arange(4.0).repeat(1000, 1)
    with default_dtype(torch.bfloat16):
        kept = limited(softmax_topk(logits, 2), 4, 1.3)
    assert [int((kept.routing.topk_idx == expert).sum()) for expert in (2, 3)] == [650, 650]


@pytest.mark.parametrize(
    ("factor", "tokens", "kept"), [(1.1, 100, 55), (1.1, 200, 110), (1.0, 3, 2), (1e307, 5, 5), (2, 5, 5)]
)
def test_capacities_are_exact(factor, tokens, kept):
    """1.1 * 100 is 110.00000000000001."""
    logits = torch.zeros(tokens, 2)
    found = limited(softmax_topk(logits, 1), 2, factor).routing.topk_idx
    assert int((found == 0).sum()) == kept
