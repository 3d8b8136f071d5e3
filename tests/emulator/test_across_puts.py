"""Decode calls across nodes whose messages are put into memory of other ranks, over a network of the tests.

tests/emulator/test_across_decode.py runs some of its tests so, too.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest
import torch

from support import decode_jobs, throughput_jobs
from support.decoding import CASTS, Step, check_combined, check_received
from support.emulated_group import EmulatedPair, Puts, in_processes
from support.emulator import Emulator
from support.fake_network import Put, Report, Weather
from tokenferry import CapacityError, ExpertGroup, MismatchError, MoeShape, PeerTimeout, Scale, tuning
from tokenferry.kernels.control_block import RAIL_CHUNK_BYTES
from tokenferry.testing.cases import Case

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))

STORM = Weather(delay_s=0.004, reorder=True, seed=7)
LARGE = MoeShape(24, 32, 1024, 8)
"""No smaller than any case of the jobs."""
MAPPED = {"all": lambda rank: True, "some": lambda rank: rank % 3 == 0, "none": lambda rank: False}
"""Which ranks' memory their rail peers reach."""


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize(("ranks", "per_node"), [(4, 2), (3, 1)])
def test_rounds(run, ranks, per_node, mapped):
    puts = Puts(STORM, MAPPED[mapped], LARGE)
    run(ranks, decode_jobs.rounds, ranks, ranks_per_node=per_node, puts=puts)


@pytest.mark.usefixtures("both_paths")
def test_encodings(run):
    run(3, decode_jobs.encodings, 3, ranks_per_node=1, puts=Puts(STORM, MAPPED["some"], LARGE))


@pytest.mark.usefixtures("both_paths")
def test_hooks_may_be_called_in_any_order_and_twice(run):
    run(4, decode_jobs.hooks_in_any_order, 4, ranks_per_node=2, puts=Puts(STORM))


# ---------------------------------------------------------------------- the same bits

CASE = Case((40, 33, 0, 17), 8, 3, hidden=1024, dtype=torch.float32, routing="half_dropped")
"""Its messages have several chunks."""


def results(rank: int, pg: None, pair: EmulatedPair) -> tuple[list[torch.Tensor], Report]:
    """Return what calls give, and at the end what the network has done."""
    step, found = Step(CASE, rank), []
    with pair.open(pg, CASE.shape) as group:
        for cast in CASTS:
            sent = group.decode_dispatch(step.mine().x, step.routing(), quantize=cast)
            check_received(step, sent, cast)
            y = torch.randn(8 // 4, sent.plan.src_token.shape[1], 1024, generator=torch.Generator().manual_seed(rank))
            for numerics, encoding in (("exact", "same"), ("fast", "same"), ("fast", "fp8"), ("exact", "logfmt10")):
                found.append(group.decode_combine(y, sent.plan, numerics=numerics, encoding=encoding).x.clone())
        pair.barrier()
        return found, pair.report


@pytest.mark.usefixtures("both_paths")
def test_the_bits_are_those_of_exchanged_messages(run):
    """Whatever the network does to the order of what it carries; and it does something."""
    want = [found for found, _ in run(4, results, ranks_per_node=2)]
    for puts in (Puts(STORM), Puts(STORM, MAPPED["some"]), Puts(mapped=MAPPED["all"])):
        got = run(4, results, ranks_per_node=2, puts=puts)
        for (mine, _), theirs in zip(got, want, strict=True):
            assert len(mine) == len(theirs) == 4 * len(CASTS)
            assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
        report = got[0][1]
        if puts.weather is STORM:
            assert min(report.puts, report.reordered, report.delayed) > 20, report
        else:
            assert report.puts == 0, "the memory of all nodes is mapped"
        assert not report.lost


# ---------------------------------------------------------------------- what goes wrong

LOSER = 3
"""A rank of node 1; rank 1 is its rail peer."""
WIDE = Case((4, 4, 4, 4), 4, 2, hidden=4096, dtype=torch.float32)
PARTS = {
    "head": lambda num_bytes: num_bytes > RAIL_CHUNK_BYTES,
    "middle": lambda num_bytes: num_bytes == RAIL_CHUNK_BYTES,
    "tail": lambda num_bytes: num_bytes < RAIL_CHUNK_BYTES,
}
"""Which chunks of a message these are, by their bytes: the first has the head."""
LOSS_S = 6.0
"""A quarter of it is for ranks that begin a call late."""


def make_calls(group: ExpertGroup, step: Step) -> None:
    sent = group.decode_dispatch(step.mine().x, step.routing())
    group.synchronize()
    group.decode_combine(torch.ones_like(sent.x), sent.plan)
    group.synchronize()


def loses_nothing(rank: int, pg: None, pair: EmulatedPair) -> None:
    with pair.open(pg, WIDE.shape) as group:
        make_calls(group, Step(WIDE, rank))
    pair.barrier()


def loses(rank: int, pg: None, pair: EmulatedPair, armed: threading.Event) -> tuple[PeerTimeout, int]:
    """Make calls until one does not end; return what a rank raises, and how many puts were lost."""
    loses_nothing(rank, pg, pair)
    armed.set()
    with pair.open(pg, WIDE.shape, timeout_s=LOSS_S) as group:
        with pytest.raises(PeerTimeout) as caught:  # noqa: PT012 - in which call it is raised differs
            for _ in range(3):
                make_calls(group, Step(WIDE, rank))
        pair.barrier()
        return caught.value, len(pair.report.lost)


LOST_PUTS = [(1, "decode_dispatch", "head"), (4, "decode_dispatch", "tail"), (3, "decode_combine", "middle")]
"""The dispatch has one exchange, the combine two, the first of them of weights."""


def lose_a_put(exchange: int, part: str, *, run: Callable[..., list[Any]]) -> list[tuple[PeerTimeout, int]]:
    armed = threading.Event()

    def is_lost(put: Put) -> bool:
        return armed.is_set() and (put.sender, put.exchange) == (LOSER, exchange) and PARTS[part](put.num_bytes)

    return run(4, loses, armed, ranks_per_node=2, puts=Puts(Weather(reorder=True, loses=is_lost)))


def lose_no_put(*, run: Callable[..., list[Any]]) -> None:
    run(4, loses_nothing, ranks_per_node=2, puts=Puts())


@pytest.fixture(scope="module")
def lost_puts(pytestconfig) -> dict[int, Future[list[list[tuple[PeerTimeout, int]]]]]:
    """By exchange, what the ranks of a job raise; those of all jobs wait at the same time."""
    jobs = {exchange: partial(lose_a_put, exchange, part) for exchange, _, part in LOST_PUTS}
    return in_processes(pytestconfig, lose_no_put, jobs)


@pytest.mark.parametrize(("exchange", "phase", "part"), LOST_PUTS)
def test_a_lost_put_is_named(lost_puts, exchange, phase, part):
    [found] = lost_puts[exchange].result()
    for error, num_lost in found[:2]:
        assert (error.peers, error.nodes) == ((LOSER,), (1,)), error
        assert error.waited_s <= LOSS_S
        assert num_lost > 0
    assert found[1][0].phase == phase
    assert "nothing came" in str(found[1][0])


def too_large(rank: int, pg: None, pair: EmulatedPair) -> str:
    """A view has larger rows than the group, whose memory they do not fit."""
    small, large = (Step(Case((3, 2), 4, 2, hidden=hidden, dtype=torch.float32), rank) for hidden in (64, 512))
    with pair.open(pg, small.case.shape) as group:
        for hook in (False, True):
            with pytest.raises(CapacityError) as caught:
                group.for_shape(large.case.shape).decode_dispatch(
                    large.mine().x, large.routing(), return_hook=hook
                )  # fmt: skip
            sent = group.decode_dispatch(small.mine().x, small.routing(), return_hook=hook)
            sent.hook()
            check_received(small, sent, None)
            check_combined(group, small, sent, torch.float32, fast=hook)
    return str(caught.value)


def test_messages_that_do_not_fit(run):
    for text in run(2, too_large, ranks_per_node=1, puts=Puts()):
        assert "decode_dispatch: what goes to another node takes" in text
        assert "make the group with the largest shape" in text


def other_sizes(rank: int, pg: None, pair: EmulatedPair) -> str:
    """The nodes make calls whose messages have different sizes."""
    case = Case((3, 2), 4, 2, hidden=4096, dtype=torch.float32)
    with pair.open(pg, case.shape, timeout_s=10.0) as group:
        x = Step(case, rank).mine().x
        with pytest.raises(MismatchError) as caught:  # noqa: PT012 - some raise with the next call
            group.decode_dispatch(x, Step(case, rank).routing(), quantize=Scale.FLOAT32 if rank else None)
            group.synchronize()
        pair.barrier()
        return str(caught.value)


def test_messages_of_different_sizes_meet(run):
    """At once: neither waits for the rest of the larger one."""
    for text in run(2, other_sizes, ranks_per_node=1, puts=Puts()):
        assert "made different calls" in text
        assert "waited for" not in text


# ---------------------------------------------------------------------- calls that begin with a message


@pytest.mark.parametrize("at_once", [True, False])
def test_round_trips(run, monkeypatch, at_once):
    """Headers of dispatch, redispatch and combine are put, whether the routing crosses at once or later."""
    if not at_once:
        monkeypatch.setattr(tuning, "ROUTING_AT_ONCE_BYTES", 0)
    run(3, throughput_jobs.round_trips, 3, ranks_per_node=1, puts=Puts(STORM, MAPPED["some"], LARGE))


def other_kinds(rank: int, pg: None, pair: EmulatedPair) -> str:
    """One node dispatches for throughput, the other for decoding."""
    case = Case((3, 2), 4, 2, hidden=64, dtype=torch.float32)
    with pair.open(pg, case.shape, timeout_s=10.0) as group:
        x, routing = Step(case, rank).mine().x, Step(case, rank).routing()
        with pytest.raises(MismatchError) as caught:  # noqa: PT012 - some raise with the next call
            (group.decode_dispatch if rank else group.dispatch)(x, routing)
            group.synchronize()
        pair.barrier()
        return str(caught.value)


def test_calls_of_different_kinds_meet(run):
    for text in run(2, other_kinds, ranks_per_node=1, puts=Puts()):
        assert "made different calls" in text
