"""How far tokens go: the closed formula against every choice of experts, and sampled routings against both."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenferry.cost.case import Case, Cluster, Gate
from tokenferry.cost.reach import reach_of, uniform_reach
from tokenferry.cost.sampling import Sampling, choose, log_popularity, sample_routing
from tokenferry.nn import GroupLimit, group_limited_topk
from tokenferry.types import MoeShape

V3 = MoeShape(256, 8, 7168, 4096)
CPU = torch.device("cpu")


def case(nodes, per_node, experts, top_k, gate=Gate()):  # noqa: B008 - frozen
    return Case(Cluster(nodes, per_node), MoeShape(experts, top_k, 128, 16), gate)


@pytest.mark.parametrize(("nodes", "remote"), [(2, 1.00), (4, 2.71), (8, 4.63), (16, 6.12)])
def test_remote_nodes_of_deepseek_v3(nodes, remote):
    """The table that the protocol was chosen by."""
    assert uniform_reach(Case(Cluster(nodes, 8), V3)).remote_nodes_per_token == pytest.approx(remote, abs=0.005)


@pytest.mark.parametrize(
    ("nodes", "per_node", "experts", "top_k"),
    [(1, 1, 3, 2), (2, 1, 6, 1), (2, 2, 8, 3), (3, 1, 9, 4), (2, 3, 12, 6), (4, 2, 8, 8), (5, 1, 10, 7)],
)
def test_the_formula_is_the_mean_over_all_choices(nodes, per_node, experts, top_k):
    ranks = nodes * per_node
    choices = list(combinations(range(experts), top_k))
    reach = uniform_reach(case(nodes, per_node, experts, top_k))
    for values, places in ((reach.nodes, nodes), (reach.ranks, ranks)):
        for place, value in enumerate(values):
            hits = sum(any(expert // (experts // places) == place for expert in choice) for choice in choices)
            assert value == pytest.approx(hits / len(choices))


def test_sampling_agrees_with_the_formula():
    uniform = case(4, 2, 32, 4)
    exact = uniform_reach(uniform)
    # A skew too small to matter: sampled, and not averaged.
    sampled = reach_of(case(4, 2, 32, 4, Gate(skew=1e-9)), Sampling(20000, seed=1))
    assert (exact.sampled_tokens, sampled.sampled_tokens) == (0, 20000)
    assert sampled.nodes == pytest.approx(exact.nodes, abs=0.02)
    assert sampled.ranks == pytest.approx(exact.ranks, abs=0.02)
    assert reach_of(uniform, Sampling()) == exact


def test_a_token_has_distinct_experts_of_few_groups():
    gate = Gate(8, 3, skew=0.5)
    batches = list(sample_routing(MoeShape(32, 5, 128, 1), gate, Sampling(1000, seed=2)))
    drawn = torch.cat(batches)
    assert drawn.shape == (1000, 5)
    assert drawn.dtype == torch.int64
    assert all(len(set(experts)) == 5 for experts in drawn.tolist())
    assert max(len({expert // 4 for expert in experts}) for experts in drawn.tolist()) == 3


def test_samples_in_several_batches(monkeypatch):
    monkeypatch.setattr("tokenferry.cost.sampling._NUMBERS_AT_ONCE", 32 * 7)
    sizes = [len(batch) for batch in sample_routing(MoeShape(32, 2, 128, 1), Gate(skew=1), Sampling(20))]
    assert sizes == [7, 7, 6]


@pytest.mark.parametrize(("groups", "top_groups", "top_k"), [(8, 4, 8), (4, 1, 3), (32, 4, 4), (1, 1, 5)])
def test_groups_are_chosen_as_the_router_does(groups, top_groups, top_k):
    logits = torch.randn(200, 32, dtype=torch.float64, device=CPU, generator=torch.Generator(CPU).manual_seed(3))
    expected = group_limited_topk(logits, top_k, GroupLimit(groups, top_groups)).topk_idx
    assert torch.equal(choose(logits, Gate(groups, top_groups), top_k), expected)


def test_the_same_seed_draws_the_same_tokens():
    skewed = case(2, 2, 16, 2, Gate(skew=1.0))
    first, again, other = (reach_of(skewed, Sampling(500, seed)) for seed in (5, 5, 6))
    assert first == again != other


def test_one_expert_is_drawn_by_its_popularity():
    """K=1 has a formula: weight over the sum of weights."""
    gate = Gate(skew=1.2, placement="sorted")
    weights = [1 / (place + 1) ** 1.2 for place in range(8)]
    reach = reach_of(case(4, 1, 8, 1, gate), Sampling(40000))
    expected = [(weights[2 * node] + weights[2 * node + 1]) / sum(weights) for node in range(4)]
    assert reach.nodes == pytest.approx(expected, abs=0.01)


def test_two_experts_without_replacement():
    """K=2: the second in proportion to what the first leaves."""
    weights = [1, 1 / 2, 1 / 3, 1 / 4]
    total = sum(weights)
    expected = [
        weights[e] / total + sum(w / total * weights[e] / (total - w) for i, w in enumerate(weights) if i != e)
        for e in range(4)
    ]
    reach = reach_of(case(4, 1, 4, 2, Gate(skew=1, placement="sorted")), Sampling(40000))
    assert reach.nodes == pytest.approx(expected, abs=0.01)


def test_shuffled_experts_have_the_same_popularities():
    shuffled, in_order = (
        log_popularity(64, Gate(skew=1.0, placement=placement), torch.Generator(CPU).manual_seed(0))
        for placement in ("shuffled", "sorted")
    )
    assert not torch.equal(shuffled, in_order)
    assert torch.equal(shuffled.sort(descending=True).values, in_order)


def test_places_that_only_chance_tells_apart_are_averaged():
    assert len(set(reach_of(case(4, 2, 32, 4, Gate(8, 2)), Sampling(500)).ranks)) == 1
    # Two groups on three nodes: the node in the middle has a part of both.
    outer, middle, last = reach_of(case(3, 2, 12, 3, Gate(2, 1)), Sampling(4000)).nodes
    assert outer == pytest.approx(last, abs=0.03)
    assert middle > outer + 0.2


def test_few_groups_reach_few_nodes():
    limited = reach_of(Case(Cluster(8, 8), V3, Gate(8, 4)), Sampling(4096))
    assert 3.7 < limited.nodes_per_token <= 4
    assert limited.remote_nodes_per_token == pytest.approx(limited.nodes_per_token * 7 / 8)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.data())
def test_more_choices_reach_further_and_more_places_split_further(nodes, per_node, width, data):
    experts = 2 * nodes * per_node * width
    top_k = data.draw(st.integers(1, experts - 1))
    reach, more = (uniform_reach(case(nodes, per_node, experts, k)) for k in (top_k, top_k + 1))
    assert more.nodes_per_token >= reach.nodes_per_token
    assert more.ranks_per_token >= reach.ranks_per_token
    finer = uniform_reach(case(2 * nodes, per_node, experts, top_k))
    assert reach.nodes_per_token - 1e-9 <= finer.nodes_per_token <= min(top_k, 2 * nodes) + 1e-9
    assert reach.nodes_per_token <= reach.ranks_per_token + 1e-9 <= finer.ranks_per_token + 2e-9
