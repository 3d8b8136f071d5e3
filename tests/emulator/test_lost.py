"""Lost ranks and other faults of decode calls on the CUDA backend, on the emulator, with the jobs of tests/faults.

A thread cannot be stopped: here a rank is lost by not calling.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from support.bad_routing import decode_with_bad_experts
from support.emulator import Emulator
from support.lost_ranks import CROWDED_S, PHASES, Loss, check_both_late, check_late, lose_and_go_on, sleep_in
from support.masks import Absence, Load, by_hand, skip_and_return, under_load
from support.mismatches import MISMATCHES, check_mismatch, disagree

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))

TIMEOUT_S = 4.0
"""Enough for threads that share one processor or two."""


@pytest.mark.parametrize("absence", [Absence("dispatch"), Absence("dispatch", hook=True), Absence("combine")], ids=str)
def test_a_rank_that_is_away_comes_back(run, tmp_path, absence):
    run(3, skip_and_return, str(tmp_path), TIMEOUT_S, absence)


def test_two_ranks_that_are_away_come_back_one_by_one(run, tmp_path):
    found = run(3, under_load, str(tmp_path), TIMEOUT_S, Load((2, 1), 20, stopped=False))
    assert found[0]["masked"] in (1, 2)


@pytest.mark.parametrize("both_sides", [True, False])
def test_masks_by_hand(run, tmp_path, both_sides):
    run(3, by_hand, str(tmp_path), both_sides, TIMEOUT_S)


DECODING = [phase for phase in PHASES if phase.startswith("decode")]


def test_a_rank_that_sleeps(run, tmp_path_factory):
    """In each phase of decode calls; the ranks of all phases wait at the same time."""
    losses = [Loss(phase, str(tmp_path_factory.mktemp("sleep")), CROWDED_S) for phase in DECODING]
    with ThreadPoolExecutor(len(losses)) as pool:
        for loss, reports in zip(losses, pool.map(lambda loss: run(3, sleep_in, loss), losses), strict=True):
            check_both_late(reports, loss.phase, CROWDED_S)


@pytest.mark.parametrize(("never_calls", "phase"), [(False, DECODING[0]), (True, DECODING[1])])
def test_ranks_go_on_together(run, tmp_path, never_calls, phase):
    results = run(3, lose_and_go_on, Loss(phase, str(tmp_path), TIMEOUT_S, never_calls))
    for rank in (0, 1):
        check_late(results[rank], rank, phase, TIMEOUT_S)


@pytest.mark.parametrize("name", MISMATCHES)
def test_ranks_that_call_different_things(run, name):
    for rank, text in enumerate(run(3, disagree, name)):
        check_mismatch(text, rank, 3, name)


@pytest.mark.parametrize("culprit", [0, 1])
def test_decoding_goes_on_after_bad_experts(run, culprit):
    run(2, decode_with_bad_experts, culprit)
