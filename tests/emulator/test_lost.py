"""Lost ranks and other faults of decode calls on the CUDA backend, on the emulator; the jobs are those of tests/faults.

A thread cannot be stopped: here a rank is lost by not calling.
"""

from collections.abc import Callable
from typing import Any

import pytest
import test_bad_routing as routing
import test_go_on as go_on
import test_lost_ranks as lost

from support.emulated_group import emulate
from support.emulator import Emulator
from support.masks import Load, by_hand, skip_and_return, under_load

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))

TIMEOUT_S = 5.0
"""Of calls whose ranks are all there, and slow: threads of one processor or two."""


@pytest.fixture
def run(pytestconfig) -> Callable[..., list[Any]]:
    """``run(R, job, *args)``: call ``job(rank, crowd, hall, *args)`` in R threads."""
    return emulate(pytestconfig)


@pytest.mark.parametrize(("where", "hook"), [("dispatch", False), ("dispatch", True), ("combine", False)])
def test_a_rank_that_is_away_comes_back(run, tmp_path, where, hook):
    run(3, skip_and_return, str(tmp_path), TIMEOUT_S, where, hook)


def test_two_ranks_that_are_away_come_back_one_by_one(run, tmp_path):
    told = run(3, under_load, str(tmp_path), TIMEOUT_S, Load((2, 1), 20, stopped=False))
    assert told[0]["masked"] in (1, 2)


@pytest.mark.parametrize("both_sides", [True, False])
def test_masks_by_hand(run, tmp_path, both_sides):
    run(3, by_hand, str(tmp_path), both_sides, TIMEOUT_S)


@pytest.fixture
def patient(monkeypatch):
    """Deadlines that threads of one processor keep."""
    for module in (lost, go_on):
        monkeypatch.setattr(module, "SHORT_S", TIMEOUT_S)


DECODING = [phase for phase in lost.PHASES if phase.startswith("decode")]


@pytest.mark.parametrize("phase", DECODING)
def test_a_rank_that_sleeps(run, patient, tmp_path, phase):
    lost.check_both_late(run(3, lost.stall_in, phase, str(tmp_path)), phase)


@pytest.mark.parametrize(("how", "phase"), [("sleeps", DECODING[0]), ("never calls", DECODING[1])])
def test_ranks_go_on_together(run, patient, tmp_path, how, phase):
    results = run(3, go_on.lose_and_go_on, phase, how, str(tmp_path))
    for rank in (0, 1):
        lost.check_late(results[rank], rank, phase)


@pytest.mark.parametrize("name", lost.MISMATCHES)
def test_ranks_that_call_different_things(run, name):
    for rank, text in enumerate(run(3, lost.disagree, name)):
        lost.check_mismatch(text, rank, 3, name)


@pytest.mark.parametrize("culprit", [0, 1])
def test_decoding_goes_on_after_bad_experts(run, culprit):
    run(2, routing.decoding_errs, culprit)
