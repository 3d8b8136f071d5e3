"""Low-latency mode on four ranks."""

import pytest

from support import deep_ep_decode_jobs as jobs
from support.children import end_process
from tokenferry.testing.cases import Case
from tokenferry.testing.world import World, WorldError


@pytest.mark.parametrize("case", jobs.CASES, ids=str)
def test_round_trip(worlds, case):
    worlds(4).run(jobs.round_trip, case)


@pytest.mark.parametrize(("round_scale", "use_ue8m0"), [(False, False), (True, False), (True, True)])
def test_fp8(worlds, round_scale, use_ue8m0):
    worlds(4).run(jobs.fp8, jobs.CASES[1], round_scale, use_ue8m0)


@pytest.mark.parametrize("case", jobs.CASES, ids=str)
def test_logfmt(worlds, case):
    worlds(4).run(jobs.logfmt, case)


def test_masked_ranks_are_skipped_and_come_back(worlds):
    worlds(4).run(jobs.shrink, jobs.CASES[0])


def test_any_number_of_results_alive(worlds):
    worlds(4).run(jobs.three_alive, jobs.CASES[0])


def test_a_lost_rank_is_masked(worlds):
    worlds(3).run(jobs.lost_rank, Case((2, 3, 1), experts=6, top_k=6, hidden=128))


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_that_ends_right_after_the_constructor(ranks):
    case = Case((2, 3, 1, 4)[:ranks], experts=2 * ranks, top_k=3, hidden=128)
    with World(ranks) as world, pytest.raises(WorldError) as caught:
        world.run(jobs.gone_at_once, case, end_process)
    assert set(caught.value.errors) == {ranks - 1}, caught.value
