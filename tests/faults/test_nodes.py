"""A rank of a group of several nodes is lost, on either leg of a call: every survivor names it, in time."""

from functools import partial

import pytest

from support.lost_nodes import LOST_NODE, LOST_RANK, NUM_RANKS, Loss, Seen, lose
from support.lost_ranks import LONG_S, SLACK_S
from support.worlds import run_at_once
from tokenferry.testing.world import WorldError

TIMEOUT_S = 4.0
CASES = [("dispatch", 0), ("dispatch", 1), ("dispatch", 3), ("redispatch", 2), ("combine", 0), ("combine", 3)]
"""The call in which rank 3 is lost, and how many exchanges of that call it makes before."""


def run(how: str, timeout_s: float, folder) -> dict:
    jobs = {}
    for case in CASES:
        notes = folder / f"{case[0]}-{case[1]}"
        notes.mkdir()
        jobs[case] = partial(lose, loss=Loss(*case, how, str(notes), timeout_s))
    return run_at_once(NUM_RANKS, "cpu", jobs)


@pytest.fixture(scope="module")
def stalled(tmp_path_factory):
    return run("stall", TIMEOUT_S, tmp_path_factory.mktemp("stalled"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    return run("kill", LONG_S, tmp_path_factory.mktemp("killed"))


def check(seen: list[Seen], call: str, at_most_s: float) -> None:
    assert len(seen) == NUM_RANKS - 1
    for one in seen:
        assert one.phase.split()[0] == call
        assert (one.peers, one.nodes) == ((LOST_RANK,), (LOST_NODE,)), one.text
        assert f"rank {LOST_RANK} on node {LOST_NODE}" in one.text
        assert one.took_s < at_most_s, one.text


@pytest.mark.parametrize(("call", "exchange"), CASES)
def test_every_survivor_names_a_stalled_rank_and_all_go_on(call, exchange, stalled):
    seen = stalled[call, exchange].result()
    assert seen.pop(LOST_RANK) is None
    check(seen, call, TIMEOUT_S + SLACK_S)


@pytest.mark.parametrize(("call", "exchange"), CASES)
def test_every_survivor_names_a_dead_rank_at_once(call, exchange, killed):
    with pytest.raises(WorldError) as caught:
        killed[call, exchange].result()
    assert set(caught.value.errors) == {LOST_RANK}, caught.value
    check(list(caught.value.results.values()), call, LONG_S)
