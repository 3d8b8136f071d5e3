"""Hooks that are called late or never: they hold up no call, change no result, and take no memory that grows."""

import pytest
import torch

from support.decode_jobs import hooks_of_some_ranks
from support.decoding import Step, check_received
from support.pairs import CPU_PAIRS, NODES, PAIRS, Pair
from support.throughput import check_round_trip
from tokenferry import DispatchOptions, MismatchError, PlanError, Routing, Scale
from tokenferry.testing.cases import Case
from tokenferry.transports.base import MOST_AWAITED
from tokenferry.transports.process_group import ProcessGroupTransport

TAGS = 1 << 15
TOKENS = (3, 4, 2, 5, 1, 3, 2, 4)
CPU_PLACES = [*((pair, 2) for pair in CPU_PAIRS), NODES[0], (NODES[3][0], 2)]
at_cpu_places = pytest.mark.parametrize(("pair", "ranks"), CPU_PLACES, ids=str)


def transports(group) -> list:
    """Return the transport of a group on CPUs, or the two that it consists of."""
    transport = group._backend._exchange.transport
    return [transport._near, transport._far] if hasattr(transport, "_near") else [transport]


def held(group) -> int:
    """Return how many segments, messages and calls a group on CPUs holds."""
    number = sum(len(kept) for kept in vars(group._backend._decoder).values() if isinstance(kept, set | list | dict))
    for transport in transports(group):
        number += len(transport._in_flight)
        if isinstance(transport, ProcessGroupTransport):
            number += sum(map(len, (*transport._incoming, *transport._outgoing)))
        else:
            number += len(transport._segments) + sum(len(peer.inbox) for peer in transport._peers.values())
    return number


def forgotten_hook(rank, pg, pair: Pair, ranks: int) -> None:
    """Rank 1 never receives its results; all calls of the others work."""
    case = Case(TOKENS[:ranks], 2 * ranks, 2, hidden=64)
    step = Step(case, rank)
    with pair.open(pg, case.shape) as group:
        for _ in range(20):
            sent = group.decode_dispatch(step.mine().x, step.routing(), return_hook=True)
            if rank != 1:
                sent.hook()
                check_received(step, sent, None)
            del sent
            check_round_trip(group, case, DispatchOptions())
        if pair.backend == "cpu":
            assert held(group) < 20, "each call takes memory of its own for good"


@pytest.mark.parametrize(("pair", "ranks"), [*((pair, 2) for pair in PAIRS), *CPU_PLACES[2:]], ids=str)
def test_a_hook_that_is_never_called_disturbs_no_call(run, pair, ranks):
    run(pair, ranks, forgotten_hook, ranks)


def only_dropped_hooks(rank, pg, pair: Pair, ranks: int) -> None:
    case = Case(TOKENS[:ranks], 2 * ranks, 2, hidden=64)
    step = Step(case, rank)
    with pair.open(pg, case.shape) as group:
        for turn in range(150):
            sent = group.decode_dispatch(step.mine().x, step.routing(), return_hook=True)
            assert held(group) <= 5 * ranks * MOST_AWAITED  # with room for what is under way
            if turn % 10 == 0:  # a plan outlives its hook, and is of no use
                plan, x = sent.plan, sent.x
                del sent
                with pytest.raises(PlanError, match="have not been received"):
                    group.decode_combine(x, plan)
        for _ in range(2):
            check_round_trip(group, case, DispatchOptions())
        assert held(group) < 20 + MOST_AWAITED, "more than segments that are given back when they are long idle"


@at_cpu_places
def test_ranks_that_drop_all_hooks_hold_few_messages(run, pair, ranks):
    run(pair, ranks, only_dropped_hooks, ranks)


def one_kept_hook(rank, pg, pair: Pair, ranks: int) -> None:
    case = Case(TOKENS[:ranks], 2 * ranks, 2, hidden=64, dtype=torch.float32)
    step = Step(case, rank)
    with pair.open(pg, case.shape) as group:
        kept = group.decode_dispatch(step.mine().x, step.routing(), return_hook=True)
        now = group.decode_dispatch(step.mine().x, step.routing())
        home = group.decode_combine(now.x, now.plan, return_hook=True)
        for _ in range(30):
            check_round_trip(group, case, DispatchOptions())
            other = group.decode_dispatch(step.mine().x, step.routing(), return_hook=True)
            other.hook()
        assert held(group) < 40
        kept.hook()
        check_received(step, kept, None)
        home.hook()
        assert torch.equal(home.x, group.decode_combine(kept.x, kept.plan).x)


@at_cpu_places
def test_a_hook_that_stays_pending_costs_later_calls_nothing(run, pair, ranks):
    run(pair, ranks, one_kept_hook, ranks)


def many_kept_hooks(rank, pg, pair: Pair, ranks: int) -> None:
    """Of more calls than a rank may be ahead of another, and as many more as pass until messages are copied."""
    num = 3 * MOST_AWAITED
    steps = [Step(Case(TOKENS[:ranks], 2 * ranks, 2, hidden=16, seed=seed), rank) for seed in range(num)]
    with pair.open(pg, steps[0].case.shape) as group:
        sent = [group.decode_dispatch(step.mine().x, step.routing(), return_hook=True) for step in steps]
        for transport in transports(group):
            assert len(getattr(transport, "_segments", ())) < 2 * MOST_AWAITED, "a segment for each pending hook"
        for i in (*range(0, num, 2), *range(num - 1, 0, -2)):
            sent[i].hook()
            check_received(steps[i], sent[i], None)


@at_cpu_places
def test_any_number_of_hooks_may_be_pending(run, pair, ranks):
    run(pair, ranks, many_kept_hooks, ranks)


def tags_come_again(rank, pg, pair: Pair, ranks: int, kept: bool) -> None:
    """The number of a message between two ranks has 15 bits in a tag: that of the combine comes again."""
    x, idx = torch.full((4, 8), 1.0), torch.full((4, 1), (rank + ranks // 2) % ranks)
    case = Case((4,) * ranks, ranks, 1, hidden=8)
    with pair.open(pg, case.shape) as group:
        sent = group.decode_dispatch(x, Routing(idx, torch.ones(4, 1)))
        old = group.decode_combine(torch.full_like(sent.x, -7.0), sent.plan, return_hook=True)
        hook = old.hook if kept else None
        old = old.x
        for transport in transports(group):
            if isinstance(transport, ProcessGroupTransport):
                transport._next_numbers = [number + TAGS - 20 for number in transport._next_numbers]
        for turn in range(20):
            home = group.decode_combine(torch.full_like(sent.x, float(turn)), sent.plan, return_hook=turn % 2 == 0)
            home.hook()
            assert home.x.eq(turn).all()
        if hook is not None:
            hook()
            assert old.eq(-7.0).all()


@pytest.mark.parametrize("kept", [False, True], ids=["dropped", "kept"])
@pytest.mark.parametrize(("pair", "ranks"), CPU_PLACES[1:], ids=str)
def test_a_tag_that_comes_again_brings_no_old_sums(run, pair, ranks, kept):
    run(pair, ranks, tags_come_again, ranks, kept)


def different_calls(rank, pg, pair: Pair, ranks: int) -> None:
    """The ranks' first calls differ; their messages have come with those of later ones when the hook is called."""
    case = Case(TOKENS[:ranks], 2 * ranks, 2, hidden=64)
    step = Step(case, rank)
    with pair.open(pg, case.shape) as group:
        mine = step.mine().x.bfloat16()
        quantize = Scale.FLOAT32 if rank == 1 else None
        sent = group.decode_dispatch(mine, step.routing(), quantize=quantize, return_hook=True)
        later = group.decode_dispatch(mine, step.routing(), return_hook=True)
        if rank == 0:
            later.hook()
        with pytest.raises(MismatchError):
            sent.hook()


@pytest.mark.parametrize("pair", CPU_PAIRS, ids=str)
def test_a_late_hook_compares_the_calls(run, pair):
    run(pair, 2, different_calls, 2)


@pytest.mark.parametrize(
    ("pair", "ranks"), [*((pair, 3) for pair in PAIRS), (Pair("cpu", "process_group", 1), 3), (NODES[3][0], 4)], ids=str
)
def test_ranks_need_not_agree_on_hooks(run, pair, ranks):
    run(pair, ranks, hooks_of_some_ranks, ranks)
