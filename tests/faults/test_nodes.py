"""A rank of a group of several nodes is lost, on either leg of a call: every survivor names it, in time."""

import os
import signal
from functools import partial

import pytest

from support.lost_nodes import LOST_NODE, LOST_RANK, NUM_RANKS, RANKS_PER_NODE, Loss, Seen, lose
from support.lost_ranks import LONG_S, SLACK_S
from support.mismatches import MISMATCHES
from support.node_faults import (
    Caught,
    close_alone,
    disagree,
    fail,
    fork,
    interrupts,
    refusals,
)
from support.refusals import PROMPTLY_S
from support.worlds import run_at_once
from tokenferry.testing.world import World, WorldError

TIMEOUT_S = 8.0
"""A quarter of it is for ranks that begin a call late."""
CASES = [("dispatch", 0), ("dispatch", 1), ("dispatch", 3), ("redispatch", 2), ("combine", 0), ("combine", 3)]
STALLED = [*CASES, ("decode_dispatch by hook", 0), ("decode_combine", 1)]
KILLED = [*CASES, ("decode_dispatch", 2), ("decode_combine by hook", 2)]
"""The call in which rank 3 is lost, and how many exchanges of that call it makes before."""


def jobs_of(cases: list[tuple[str, int]], how: str, timeout_s: float, folder) -> dict:
    jobs = {}
    for case in cases:
        notes = folder / f"{case[0]}-{case[1]}"
        notes.mkdir()
        jobs[case] = partial(lose, loss=Loss(*case, how, str(notes), timeout_s))
    return jobs


@pytest.fixture(scope="module")
def stalled(tmp_path_factory):
    jobs = jobs_of(STALLED, "stall", TIMEOUT_S, tmp_path_factory.mktemp("stalled"))
    return run_at_once(NUM_RANKS, "cpu", jobs | {"closes": partial(close_alone, timeout_s=TIMEOUT_S)})


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    return run_at_once(NUM_RANKS, "cpu", jobs_of(KILLED, "kill", LONG_S, tmp_path_factory.mktemp("killed")))


def check(seen: list[Seen], call: str, at_most_s: float) -> None:
    assert len(seen) == NUM_RANKS - 1
    for one in seen:
        assert one.phase.split()[0] == call.split()[0]
        assert (one.peers, one.nodes) == ((LOST_RANK,), (LOST_NODE,)), one.text
        assert f"rank {LOST_RANK} on node {LOST_NODE}" in one.text
        assert one.took_s < at_most_s, one.text


@pytest.mark.parametrize(("call", "exchange"), STALLED)
def test_every_survivor_names_a_stalled_rank_and_all_go_on(call, exchange, stalled):
    seen = stalled[call, exchange].result()
    assert seen.pop(LOST_RANK) is None
    check(seen, call, TIMEOUT_S + SLACK_S)


@pytest.mark.parametrize(("call", "exchange"), KILLED)
def test_every_survivor_names_a_dead_rank_at_once(call, exchange, killed):
    with pytest.raises(WorldError) as caught:
        killed[call, exchange].result()
    assert set(caught.value.errors) == {LOST_RANK}, caught.value
    check(list(caught.value.results.values()), call, LONG_S)


def check_named(caught: list[Caught], rank: int, words: str = "") -> None:
    """Check that all but one rank name that one, with its reason, long before the deadline."""
    for other, one in enumerate(caught):
        if other != rank:
            assert (one.name, one.peers, one.nodes) == ("PeerTimeout", (rank,), (rank // RANKS_PER_NODE,)), one
            assert words in one.text, one
        assert one.took_s < PROMPTLY_S, one


def fail_in(names: tuple[str, ...], moments: dict[str, BaseException]) -> dict[str, list[dict[str, Caught]]]:
    """Return, by call, what the ranks of a world catch at each moment; the worlds wait at the same time."""
    jobs = run_at_once(NUM_RANKS, "cpu", {name: partial(fail, name=name, moments=moments) for name in names})
    return {name: job.result() for name, job in jobs.items()}


@pytest.mark.parametrize("odd", [0, 3])
def test_ranks_that_call_different_things(odd):
    """Most ranks exchange nothing with the odd one, and yet all raise a MismatchError that names it."""
    with World(NUM_RANKS) as world:
        found = world.run(disagree, odd)
    for name in MISMATCHES:
        for one in (by_name[name] for by_name in found):
            assert one.name == "MismatchError", f"{name}: {one}"
            assert f"rank {odd}" in one.text, f"{name}: {one}"
            assert one.took_s < PROMPTLY_S, f"{name}: {one}"


def test_a_rank_that_is_refused_memory_or_descriptors():
    for call, found in fail_in(("dispatch", "combine", "decode_combine"), refusals()).items():
        for moment, mine in found[LOST_RANK].items():
            assert mine.name == "ResourceError", f"{call}, {moment}: {mine}"
            check_named([one[moment] for one in found], LOST_RANK, f"ResourceError: {call}")


def test_a_rank_that_is_interrupted():
    names = ("dispatch", "combine", "decode_dispatch", "decode_combine")
    for call, found in fail_in(names, interrupts()).items():
        for moment, mine in found[LOST_RANK].items():
            assert mine.name == "KeyboardInterrupt", f"{call}, {moment}: {mine}"
            check_named([one[moment] for one in found], LOST_RANK)


def test_a_rank_that_passes_a_wrong_argument_and_one_that_closes(stalled):
    found = stalled["closes"].result()
    for one in found[:LOST_RANK] + found[LOST_RANK + 1 :]:
        assert (one.name, one.peers, one.nodes) == ("PeerTimeout", (LOST_RANK,), (LOST_NODE,)), one
        assert one.took_s < TIMEOUT_S + SLACK_S


def test_forked_children(tmp_path):
    with World(NUM_RANKS) as world, pytest.raises(WorldError) as caught:
        world.run(fork, str(tmp_path))
    for child in tmp_path.glob("* is a child"):
        os.kill(int(child.name.split()[0]), signal.SIGKILL)
    assert set(caught.value.errors) == {LOST_RANK}, caught.value
    found = [caught.value.results.get(rank, Caught("", (), (), "", 0.0)) for rank in range(NUM_RANKS)]
    check_named(found, LOST_RANK)
