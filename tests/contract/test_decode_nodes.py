"""Decode calls of several nodes: what only they have, and random topologies."""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from support.decode_jobs import counters
from support.decoding import CASTS, Step, check_combined, check_encoding, check_received
from support.memory_transport import MemoryPair, run_threads
from support.pairs import NODES, Pair
from support.throughput import check_round_trip
from support.topologies import topologies
from tokenferry import CapacityError, DispatchOptions, ExpertGroup, MismatchError, MoeShape, PlanError, Routing, Scale
from tokenferry.testing.cases import ROUTINGS, Case
from tokenferry.testing.world import World

TWO_BY_TWO = NODES[0]

# ---------------------------------------------------------------------- random topologies, between threads


@dataclass(frozen=True)
class Plot:
    """What one example does.

    Attributes:
        nodes: The ranks of each node, which need not be consecutive.
        case: The inputs.
        answers: The dtype of the experts' rows.
        cast: The format of the rows that are sent out.
        encoding: The format in which sums cross.
        fast: Whether ranks add up their rows.
        hooks: Of the dispatch, and of the combine: whether it has a hook.
    """

    nodes: tuple[tuple[int, ...], ...]
    case: Case
    answers: torch.dtype
    cast: Scale | None
    encoding: str
    fast: bool
    hooks: tuple[bool, bool]


@st.composite
def plots(draw: st.DrawFn) -> Plot:
    nodes, encoding = draw(topologies(least_nodes=2)), draw(st.sampled_from(("same", "same", "fp8", "logfmt10")))
    ranks, dtype = sum(map(len, nodes)), draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32)))
    answers = draw(st.sampled_from((torch.bfloat16, torch.float32)))
    case = Case(
        tokens=tuple(draw(st.lists(st.integers(0, 5), min_size=ranks, max_size=ranks))),
        experts=ranks * draw(st.integers(1, 3)),
        top_k=draw(st.integers(1, 9)),
        hidden=128 if encoding != "same" else 16 * draw(st.integers(1, 3)),
        dtype=dtype,
        idx_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        routing=draw(st.sampled_from(ROUTINGS)),
        seed=draw(st.integers(0, 99)),
    )
    hooks = draw(st.booleans()), draw(st.booleans())
    return Plot(nodes, case, answers, draw(st.sampled_from(CASTS)), encoding, draw(st.booleans()), hooks)


def pair_of_calls(rank: int, pg: None, pair: MemoryPair, plot: Plot) -> None:
    step = Step(plot.case, rank)
    dispatch_hook, combine_hook = plot.hooks
    with pair.open(pg, plot.case.shape) as group:
        x = step.mine().x.clone()
        sent = group.decode_dispatch(x, step.routing(), quantize=plot.cast, return_hook=dispatch_hook)
        x.fill_(torch.nan)
        sent.hook()
        check_received(step, sent, plot.cast)
        if plot.encoding == "same":
            check_combined(group, step, sent, plot.answers, fast=plot.fast, hook=combine_hook)
        else:
            check_encoding(group, step, sent, plot.answers, plot.encoding, plot.fast)


@settings(
    max_examples=int(os.environ.get("EXAMPLES", "50")),
    derandomize="EXAMPLES" not in os.environ,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
@example(
    plot=Plot(((0, 3), (1, 2)), Case((3, 4, 2, 5), 8, 3), torch.float32, Scale.FLOAT32, "same", True, (True, True))
)
@given(plot=plots())
def test_any_topology_and_routing(plot):
    """In the example, the ranks of a rail are not in the order of their nodes."""
    run_threads(plot.nodes, pair_of_calls, plot)


# ---------------------------------------------------------------------- hooks


def hooks_between_calls(rank: int, pg: None, pair: MemoryPair) -> None:
    """Ranks receive a call in its hook, behind the next call, or never; each rank does what its peers wait for."""
    case = Case((3, 2, 4, 1), 8, 3, hidden=64, dtype=torch.float32)
    step = Step(case, rank)
    with pair.open(pg, case.shape) as group:
        for turn in range(4):
            late = turn % 4 == rank
            sent = group.decode_dispatch(step.mine().x, step.routing(), return_hook=True)
            if not late:
                sent.hook()
                check_received(step, sent, None)
            check_round_trip(group, case, DispatchOptions())
            sent.hook()
            check_received(step, sent, None)
            home = group.decode_combine(sent.x, sent.plan, return_hook=True)
            if not late:
                home.hook()
            again = group.decode_dispatch(step.mine().x, step.routing())
            check_received(step, again, None)
            home.hook()
            assert torch.equal(home.x, group.decode_combine(again.x, again.plan).x)


def test_a_hook_waits_for_no_hook_of_a_peer_that_makes_calls():
    run_threads(((0, 1), (2, 3)), hooks_between_calls)


def never_called(rank: int, pg: None, pair: MemoryPair) -> None:
    """Rank 1 passes on rows for others in its next call, though it never receives its own."""
    case = Case((3, 2, 4, 1), 8, 3, hidden=64, dtype=torch.float32)
    step = Step(case, rank)
    with pair.open(pg, case.shape) as group:
        for _ in range(3):
            sent = group.decode_dispatch(step.mine().x, step.routing(), return_hook=True)
            if rank != 1:
                sent.hook()
                check_received(step, sent, None)
        check_round_trip(group, case, DispatchOptions())


def test_a_hook_that_is_never_called_disturbs_no_call():
    with pytest.raises(AssertionError, match="nobody received"):  # its own rows, and nothing else
        run_threads(((0, 1), (2, 3)), never_called)


# ---------------------------------------------------------------------- slots


def overflow(rank: int, pg: None, pair: MemoryPair, hook: bool) -> str:
    """Rank 2 has three tokens for node 0, which may get two of each rank; then it sends fewer."""
    case = Case((2, 1, 3, 0), 8, 2, hidden=64, dtype=torch.float32)
    shape = replace(case.shape, node_slots=2)
    mine, weights = case.inputs()[rank], torch.ones(case.tokens[rank], 2)
    to_node_0 = torch.tensor([[0, 2]]).repeat(len(mine.x), 1)
    with pair.open(pg, shape) as group:
        texts = []
        for _ in range(2):
            with pytest.raises(CapacityError) as caught:
                group.decode_dispatch(mine.x, Routing(to_node_0, weights), return_hook=hook).hook()
            texts.append(str(caught.value))
        to_node_0[2:] = -1
        sent = group.decode_dispatch(mine.x, Routing(to_node_0, weights), return_hook=hook)
        sent.hook()
        home = group.decode_combine(sent.x, sent.plan).x
        assert torch.equal(home[:2], mine.x[:2] * 2), "the group is usable"
        check_round_trip(group, case, DispatchOptions())
    assert texts[0] == texts[1]
    return texts[0]


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("nodes", [((0, 1), (2, 3)), ((0,), (1,), (2,), (3,))], ids=str)
def test_every_rank_is_told_of_an_overflow(nodes, hook):
    texts = set(run_threads(nodes, overflow, hook))
    assert texts == {
        "decode_dispatch: rank 2 has 3 tokens for one other node, more than node_slots=2; send fewer at once, or make "
        "the group with MoeShape(node_slots=3)"
    }


def test_slots_have_no_effect_on_one_node():
    with ExpertGroup(None, MoeShape(4, 2, 64, 4, node_slots=1), backend="cpu") as group:
        group.decode_dispatch(torch.ones(4, 64), Routing(torch.tensor([[0, 3]]).repeat(4, 1)))


# ---------------------------------------------------------------------- masks by hand


def masks(rank, pg, pair: Pair, lost: tuple[int, ...]) -> None:
    """Some ranks and all others go on without each other; then all together again."""
    case = Case((3, 2, 4, 1), 8, 3, hidden=128, dtype=torch.float32)
    away = frozenset(lost) if rank not in lost else frozenset(range(4)) - set(lost)
    with pair.open(pg, case.shape) as group:
        everyone, apart = Step(case, rank), Step(case, rank, away)
        for step in (everyone, apart, everyone, apart):
            for other in set(range(4)) - {rank}:
                group.mask(other, masked=other in step.away)
            for fp8 in (Scale.FLOAT32, None):
                sent = group.decode_dispatch(step.mine().x, step.routing(), quantize=fp8, return_hook=fp8 is None)
                sent.hook()
                check_received(step, sent, fp8)
                check_combined(group, step, sent, torch.float32)
                check_combined(group, step, sent, torch.float32, fast=True, hook=True)
                check_encoding(group, step, sent, torch.float32, "fp8", fast=True)
        for other in away:
            group.mask(other, masked=False)
        if away:
            with pytest.raises(PlanError, match="made while ranks were masked"):
                group.decode_combine(sent.x, sent.plan)
        check_round_trip(group, case, DispatchOptions())


@pytest.mark.parametrize("lost", [(3,), (0,), (2, 3), (1, 2)], ids=str)
def test_masked_ranks_and_nodes_are_skipped_both_ways(run, lost):
    pair, ranks = TWO_BY_TWO
    run(pair, ranks, masks, lost)


def masked_meanwhile(rank, pg, pair: Pair) -> dict[str, list[int]]:
    """Ranks 0 to 2 and rank 3 mask each other while calls have open hooks; return by call from whom rows came."""
    case = Case((3, 3, 3, 3), 4, 4, hidden=64, dtype=torch.float32, routing="even")
    x, routing = torch.ones(3, 64), Routing(torch.arange(4).repeat(3, 1), torch.ones(3, 4))
    came = {}
    with pair.open(pg, case.shape) as group:
        for call in ("dispatch", "combine"):
            sent = group.decode_dispatch(x, routing, return_hook=call == "dispatch")
            home = None if call == "dispatch" else group.decode_combine(sent.x, sent.plan, return_hook=True)
            pg.barrier().wait()
            for other in {3} if rank != 3 else {0, 1, 2}:
                group.mask(other)
            (sent if home is None else home).hook()
            came[call] = [int(line > 0) for line in (sent.plan.src_range[0] & 0xFFFFFFFF).tolist()]
            if home is not None:
                came[call] = home.x[:, 0].int().unique().tolist()
            apart = group.decode_dispatch(x, routing)
            assert group.decode_combine(apart.x, apart.plan).x.eq(1.0 if rank == 3 else 3.0).all()
            for other in {3} if rank != 3 else {0, 1, 2}:
                group.mask(other, masked=False)
            again = group.decode_dispatch(x, routing)
            assert group.decode_combine(again.x, again.plan).x.eq(4.0).all()
    return came


def test_what_a_masked_rank_would_have_passed_on_is_missing_in_calls_under_way(run):
    pair, ranks = TWO_BY_TWO
    found = run(pair, ranks, masked_meanwhile)
    assert [one["dispatch"] for one in found] == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    # Tokens of rank 0 miss the expert of rank 3; those of rank 1 the sum of node 1, which rank 3 would have sent.
    assert [one["combine"] for one in found] == [[3], [2], [3], [1]]


def mask_on_one_side(rank, pg, pair: Pair) -> str:
    case = Case((3, 2, 4, 1), 8, 3, hidden=128, dtype=torch.float32)
    step = Step(case, rank)
    with pair.open(pg, case.shape) as group:
        if rank < 2:
            group.mask(3)
        with pytest.raises(MismatchError) as caught:
            group.decode_dispatch(step.mine().x, step.routing())
    return str(caught.value)


def test_ranks_agree_whether_any_is_masked():
    pair, ranks = TWO_BY_TWO
    with World(ranks) as world:
        for text in world.run(mask_on_one_side, pair):
            assert "whether ranks are masked" in text


# ---------------------------------------------------------------------- counters


def test_counters_are_added_to(run):
    """A rank waits for its node, and for the nodes of others: for all ranks of a node that is late."""
    pair, ranks = TWO_BY_TWO
    for rank, (dispatch, combine) in enumerate(run(pair, ranks, counters, ranks)):
        assert (dispatch[rank], combine[rank]) == (10**15, 0), "a rank waited for itself"
        if rank:
            assert 10**15 < dispatch[0] < 10**15 + 60e9
            assert 0 < combine[0] < 60e9
