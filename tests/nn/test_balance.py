"""Placements: every expert has its slots, no rank has more than it must, and the optimum of tiny cases is near."""

import itertools
import re
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tokenferry
from tokenferry.nn import GroupLimit, group_limited_topk
from tokenferry.nn.balance import Placement, balance


@st.composite
def problems(draw):
    """(loads, R, P, nodes, groups): any that `balance` takes."""
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    groups = nodes * draw(st.integers(1, 3))
    size = draw(st.integers(1, 4))
    on_node = groups // nodes * size
    width = draw(st.integers(-(-on_node // per_node), on_node))
    numbers = st.one_of(st.integers(0, 5), st.integers(0, 10**6), st.floats(0, 1e6, allow_subnormal=False))
    loads = draw(st.lists(numbers, min_size=groups * size, max_size=groups * size))
    num_ranks = nodes * per_node
    ranks = draw(st.permutations(range(num_ranks)))
    places = [sorted(ranks[first : first + per_node]) for first in range(0, num_ranks, per_node)]
    return torch.tensor(loads, dtype=torch.float64), num_ranks, num_ranks * width, places, groups


def highest(placement, loads):
    return float(placement.rank_loads(loads).max())


def no_higher(got, want):
    """Within what a sum in another order may differ."""
    return got <= want * (1 + 1e-9)


def split_groups(placement, nodes, num_groups):
    """The groups of experts that are on several nodes."""
    width, size = placement.num_slots // placement.num_ranks, placement.num_experts // num_groups
    slots = placement.physical_to_logical.tolist()
    ranks = [{slot // width for slot, e in enumerate(slots) if e // size == group} for group in range(num_groups)]
    return [group for group, on in enumerate(ranks) if not any(on <= set(node) for node in nodes)]


@settings(max_examples=200)
@given(problems())
def test_every_expert_is_placed(problem):
    loads, num_ranks, num_slots, nodes, num_groups = problem
    placement = balance(loads, num_ranks, num_slots, nodes=nodes, num_groups=num_groups)
    slots, table = placement.physical_to_logical.tolist(), placement.logical_to_physical.tolist()
    assert len(slots) == num_slots
    assert placement.num_experts == len(table) == len(loads)
    for expert, row in enumerate(table):
        held = [slot for slot in range(num_slots) if slots[slot] == expert]
        assert held, f"expert {expert} is nowhere"
        assert row == held + [-1] * (len(row) - len(held))
        assert placement.num_replicas[expert] == len(held)
    assert not split_groups(placement, nodes, num_groups)
    width = num_slots // num_ranks
    each = [load / len([s for s in slots if s == expert]) for expert, load in enumerate(loads.tolist())]
    want = [sum(each[e] for e in slots[first : first + width]) for first in range(0, num_slots, width)]
    assert placement.rank_loads(loads).tolist() == pytest.approx(want)


@settings(max_examples=200)
@given(problems())
@example((torch.tensor([4.0, 7, 7, 1, 6, 6]), 2, 8, [[0, 1]], 1))  # replicas of the busiest are not enough
@example((torch.tensor([8.0, 8, 3, 3, 6, 6, 4, 6]), 2, 8, [[0, 1]], 1))  # packed by load, swaps do not find 22
@example(  # packed by load, groups share their nodes with others than by number, by which no rank has more than 128
    (torch.tensor([60.0, 68, 64, 64, 0, 95, 36, 48, 10, 72, 82, 10]), 6, 12, [[0, 1, 2], [3, 4, 5]], 4)
)
def test_replicas_and_swaps_never_make_it_worse(problem):
    """Nor is a placement worse than that by number, from which a layer may come."""
    loads, num_ranks, num_slots, nodes, num_groups = problem
    num_experts = len(loads)
    placement = balance(loads, num_ranks, num_slots, nodes=nodes, num_groups=num_groups)
    if num_experts % num_ranks == 0:
        without = balance(loads, num_ranks, num_experts, nodes=nodes, num_groups=num_groups)
        assert no_higher(highest(placement, loads), highest(without, loads))
        everywhere = balance(loads, num_ranks, num_experts)
        by_number = Placement.of(torch.arange(num_experts), num_ranks)
        assert no_higher(highest(everywhere, loads), highest(by_number, loads))
        if not split_groups(by_number, nodes, num_groups):
            assert no_higher(highest(placement, loads), highest(by_number, loads))


def optimum(loads, num_ranks, width):
    """The smallest maximum over all ways to fill the slots."""
    one_rank = list(itertools.combinations_with_replacement(range(len(loads)), width))
    best = float("inf")
    for ranks in itertools.combinations_with_replacement(one_rank, num_ranks):
        counts = Counter(itertools.chain.from_iterable(ranks))
        if len(counts) == len(loads):
            best = min(best, max(sum(loads[e] / counts[e] for e in slots) for slots in ranks))
    return best


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "width"), [(4, 2, 2), (4, 2, 3), (5, 2, 3), (6, 3, 2), (4, 3, 2), (3, 2, 2)]
)
def test_tiny_cases_are_near_the_optimum(num_experts, num_ranks, width):
    draws = torch.Generator().manual_seed(num_experts + 10 * width)
    ratios = []
    for _ in range(40):
        loads = torch.randint(0, 20, (num_experts,), generator=draws)
        best = optimum(loads.tolist(), num_ranks, width)
        got = highest(balance(loads, num_ranks, num_ranks * width), loads)
        assert got >= best * (1 - 1e-9), "the brute force is wrong"
        ratios.append(got / best if best else 1.0)
    assert max(ratios) <= 4 / 3
    assert sum(ratios) / len(ratios) <= 1.06


@pytest.mark.parametrize("kind", ["uniform", "zipf", "lognormal"])
@pytest.mark.parametrize(("num_experts", "num_ranks", "num_slots"), [(256, 32, 288), (64, 8, 72)])
def test_random_loads_are_near_the_lower_bound(kind, num_experts, num_ranks, num_slots):
    """No rank has less than the mean, which one slot more on each rank comes close to."""
    draws = torch.Generator().manual_seed(num_experts)
    zipf = 1 / torch.arange(1, num_experts + 1, dtype=torch.float64)
    loads = {
        "uniform": lambda: torch.rand(num_experts, generator=draws),
        "zipf": lambda: zipf[torch.randperm(num_experts, generator=draws)],
        "lognormal": lambda: torch.randn(num_experts, generator=draws).exp(),
    }[kind]
    layers = torch.stack([loads() for _ in range(3)])
    totals = balance(layers, num_ranks, num_slots).rank_loads(layers)
    assert (totals.max(1).values / totals.mean(1)).tolist() == pytest.approx([1.0] * 3, rel=0.005)


def test_nodes_of_a_limited_router_stay_limited():
    """Groups of experts stay together, so a token that may use two groups goes to two nodes at most."""
    draws = torch.Generator().manual_seed(0)
    routing = group_limited_topk(torch.randn(200, 32, generator=draws), 4, GroupLimit(8, 2))
    loads = torch.bincount(routing.topk_idx.flatten(), minlength=32)
    nodes = ((0, 2), (1, 3), (4, 6), (5, 7))
    placement = balance(loads, 8, 40, nodes=nodes, num_groups=8)
    node_of_rank = {rank: node for node, ranks in enumerate(nodes) for rank in ranks}
    for experts in routing.topk_idx.tolist():
        slots = placement.logical_to_physical[experts]
        assert len({node_of_rank[int(slot) // 5] for slot in slots[slots >= 0]}) <= 2


@settings(max_examples=100)
@given(problems(), st.randoms(use_true_random=False))
def test_a_previous_placement_costs_little(problem, random):
    """All that is promised of a placement still holds, but for 2 %."""
    loads, num_ranks, num_slots, nodes, num_groups = problem
    before = loads[random.sample(range(len(loads)), len(loads))]
    for by in ({}, {"nodes": nodes, "num_groups": num_groups}):
        old = balance(before, num_ranks, num_slots, **by)
        fresh = balance(loads, num_ranks, num_slots, nodes=nodes, num_groups=num_groups)
        new = balance(loads, num_ranks, num_slots, nodes=nodes, num_groups=num_groups, previous=old)
        assert no_higher(highest(new, loads), 1.02 * highest(fresh, loads))
        assert not split_groups(new, nodes, num_groups)


def moved(old, new):
    return int((old.physical_to_logical != new.physical_to_logical).sum())


def test_few_experts_move_from_a_previous_placement():
    draws = torch.Generator().manual_seed(0)
    before = torch.randn(2, 64, generator=draws).exp()
    loads = before * (1 + 0.1 * torch.randn(2, 64, generator=draws))
    nodes = ((0, 1, 2, 3), (4, 5, 6, 7))
    for by in ({}, {"nodes": nodes, "num_groups": 8}):
        old = balance(before, 8, 80, **by)
        assert moved(balance(loads, 8, 80, **by), old) > 100
        assert 0 < moved(balance(loads, 8, 80, **by, previous=old), old) <= 12
        assert moved(balance(before, 8, 80, **by, previous=old), old) == 0


def test_previous_placements_that_do_not_fit():
    for old in (balance(torch.ones(8), 2, 8), balance(torch.ones(8), 4, 12), balance(torch.ones(1, 8), 4, 8)):
        with pytest.raises(
            tokenferry.ConfigError, match=re.escape("expected a placement of [8] experts in 8 slots on 4")
        ):
            balance(torch.ones(8), 4, 8, previous=old)


def test_layers_are_independent():
    loads = torch.tensor([[9, 1, 1, 1], [1, 1, 1, 9]])
    both = balance(loads, 2, 6)
    for index in range(2):
        one = balance(loads[index], 2, 6)
        assert torch.equal(both.layer(index).physical_to_logical, one.physical_to_logical)
        assert torch.equal(both.layer(index).logical_to_physical, one.logical_to_physical)
        assert torch.equal(both.rank_loads(loads)[index], one.rank_loads(loads[index]))
    assert both.num_replicas[0, 0] > 1 < both.num_replicas[1, 3]


@pytest.mark.parametrize(
    ("loads", "sizes", "kwargs", "error", "message"),
    [
        (torch.ones(2, 2, 2), (2, 2), {}, tokenferry.ShapeError, "expected numbers [E] or [layers, E]"),
        (torch.ones(0), (2, 2), {}, tokenferry.ShapeError, "got torch.float32 [0]"),
        (torch.tensor([1.0, -1]), (2, 2), {}, tokenferry.ArgumentError, "expected finite numbers from 0 on"),
        (torch.tensor([1.0, torch.nan]), (2, 2), {}, tokenferry.ArgumentError, "expected finite numbers from 0 on"),
        (torch.ones(4), (3, 4), {}, tokenferry.ConfigError, "num_ranks=3 does not divide 4 slots"),
        (
            torch.ones(4),
            (2, 2),
            {},
            tokenferry.ConfigError,
            "num_slots=2: with 2 ranks on 1 node and E=4 experts use 4 to 8; each",
        ),
        (
            torch.ones(4),
            (2, 10),
            {},
            tokenferry.ConfigError,
            "num_slots=10: with 2 ranks on 1 node and E=4 experts use 4 to 8; each expert has",
        ),
        (torch.ones(4), (2, 4), {"num_groups": 2}, tokenferry.ConfigError, "num_groups=2 needs nodes="),
        (torch.ones(4), (2, 4), {"nodes": [[0], [0]]}, tokenferry.ConfigError, "got [[0], [0]]"),
        (torch.ones(4), (2, 4), {"nodes": [[0], [1]]}, tokenferry.ConfigError, "num_groups=1: expected a multiple of"),
        (
            torch.ones(4),
            (2, 6),
            {"nodes": [[0], [1]], "num_groups": 2},
            tokenferry.ConfigError,
            "num_slots=6: with 2 ranks on 2 nodes and E=4 experts use 4; each expert has at least one slot",
        ),
        (
            torch.ones(32),
            (1, 36),
            {},
            tokenferry.ConfigError,
            "num_slots=36: with 1 rank on 1 node and E=32 experts use 32; each expert has at least one slot, and at "
            "most one on each rank of its node",
        ),
    ],
)
def test_what_balance_refuses(loads, sizes, kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        balance(loads, *sizes, **kwargs)


@pytest.mark.parametrize(
    ("slots", "num_ranks", "error", "message"),
    [
        (torch.tensor([0.0, 1]), 2, tokenferry.ShapeError, "expected integers [P] or [layers, P], got torch.float32"),
        (torch.tensor([0, 1]), 3, tokenferry.ConfigError, "num_ranks=3 does not divide 2 slots"),
        (torch.tensor([0, -1]), 2, tokenferry.ConfigError, "expected experts from 0 on, got -1"),
        (torch.tensor([[0, 1], [1, 1]]), 2, tokenferry.ConfigError, "no slot of layer 1 holds expert 0"),
    ],
)
def test_what_placements_refuse(slots, num_ranks, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Placement.of(slots, num_ranks)


def test_loads_and_layers_that_do_not_fit():
    placement = balance(torch.ones(4), 2, 4)
    with pytest.raises(tokenferry.ShapeError, match=re.escape("expected [4], got [2, 4]")):
        placement.rank_loads(torch.ones(2, 4))
    with pytest.raises(tokenferry.ShapeError, match="that of one layer"):
        placement.layer(0)
