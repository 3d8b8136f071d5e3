"""A rank whose process ends while the deadline is too far away to help: the others notice at once.

tests/faults/test_lost_ranks.py has the calls one by one.
"""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from support.ended_ranks import (
    SOON_S,
    Ending,
    be_killed,
    be_survived_by_a_child,
    check_ended,
    decode_until_killed,
    end_in,
    end_in_a_decode_graph,
    end_in_a_throughput_graph,
    go_on_after_an_end,
)
from support.lost_ranks import LOST_RANK
from support.masks import Absence
from support.pairs import CPU_PAIRS, CUDA_PAIRS
from tokenferry import ExpertGroup
from tokenferry.testing.world import World, WorldError


def results_of_the_others(pair, job: Callable[..., Any], *args: object) -> dict[int, Any]:
    """Run a job in which rank 2 is killed."""
    with World(3, devices=pair.backend, timeout_s=120.0) as world, pytest.raises(WorldError) as caught:
        world.run(job, pair, *args)
    assert set(caught.value.errors) == {LOST_RANK}, caught.value
    assert isinstance(caught.value.errors[LOST_RANK], ChildProcessError)
    return caught.value.results


ABSENCES = [Absence("dispatch"), Absence("combine", hook=True)]


@pytest.mark.parametrize("absence", ABSENCES, ids=str)
@pytest.mark.parametrize("pair", CUDA_PAIRS, ids=str)
def test_decoding_goes_on_without_a_rank_that_was_killed(pair, absence, tmp_path):
    results_of_the_others(pair, go_on_after_an_end, Ending(str(tmp_path), end=be_killed), absence)


@pytest.mark.parametrize("pair", [CPU_PAIRS[0], *CUDA_PAIRS], ids=str)
def test_decoding_goes_on_after_a_kill_at_any_moment(pair, tmp_path):
    with World(3, devices=pair.backend, timeout_s=120.0) as world:
        world.submit(decode_until_killed, pair, str(tmp_path))
        deadline = time.monotonic() + 100.0
        while len(list(tmp_path.glob("ready *"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # somewhere
        os.kill(world.pids[LOST_RANK], signal.SIGKILL)
        with pytest.raises(WorldError) as caught:
            world.collect()
    assert set(caught.value.errors) == {LOST_RANK}, caught.value
    assert all(1 <= lost <= 2 for lost in caught.value.results.values()), "rank 2 was waited for again and again"


@pytest.mark.parametrize("pair", CUDA_PAIRS, ids=str)
@pytest.mark.parametrize("phase", ["combine of EXPERTS", "decode_dispatch"])
def test_a_living_child_does_not_hide_the_end_of_its_parent(pair, phase, tmp_path):
    reports = results_of_the_others(pair, end_in, Ending(str(tmp_path), end=be_survived_by_a_child), phase)
    for rank, report in reports.items():
        check_ended(report, rank, phase)


@pytest.mark.parametrize("pair", CUDA_PAIRS, ids=str)
@pytest.mark.parametrize("phase", ["dispatch", "combine", "decode_combine"])
def test_a_closed_group_is_noticed_by_kernels(worlds, pair, phase, tmp_path):
    reports = worlds(3, pair.backend).run(end_in, pair, Ending(str(tmp_path), end=ExpertGroup.close), phase)
    for rank in (0, 1):
        check_ended(reports[rank], rank, phase, "it closed the group")


@pytest.mark.parametrize("pair", CUDA_PAIRS, ids=str)
def test_replays_of_decode_calls_go_on(pair, tmp_path):
    results_of_the_others(pair, end_in_a_decode_graph, Ending(str(tmp_path), end=be_killed))


@pytest.mark.parametrize("pair", CUDA_PAIRS, ids=str)
def test_replays_of_throughput_calls_end(pair, tmp_path):
    reports = results_of_the_others(pair, end_in_a_throughput_graph, Ending(str(tmp_path), end=be_killed))
    for report in reports.values():
        assert report.peers == (LOST_RANK,)
        assert "its process ended" in report.text
        assert report.took_s < SOON_S
