"""Lost ranks and other faults of decode calls on the CUDA backend, on the emulator, with the jobs of tests/faults.

A thread cannot be stopped: here a rank is lost by not calling.
"""

from concurrent.futures import Future
from functools import partial

import pytest

from support.bad_routing import decode_with_bad_experts
from support.emulated_group import in_processes, on_ranks
from support.emulator import Emulator
from support.lost_ranks import (
    CASE,
    CROWDED_S,
    PHASES,
    Loss,
    Report,
    check_both_late,
    check_late,
    lose_and_go_on,
    sleep_in,
    work,
)
from support.masks import Absence, Load, by_hand, make_all_calls, skip_and_return, under_load
from support.mismatches import MISMATCHES, check_mismatch, disagree

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))

JOBS = {
    "away from a dispatch": partial(skip_and_return, timeout_s=CROWDED_S, absence=Absence("dispatch")),
    "away from a dispatch by hook": partial(
        skip_and_return, timeout_s=CROWDED_S, absence=Absence("dispatch", hook=True)
    ),
    "away from a combine": partial(skip_and_return, timeout_s=CROWDED_S, absence=Absence("combine")),
    "two, who come back one by one": partial(under_load, timeout_s=CROWDED_S, load=Load((2, 1), 20, stopped=False)),
    "masked by both sides": partial(by_hand, both_sides=True, timeout_s=CROWDED_S),
    "masked by one side": partial(by_hand, both_sides=False, timeout_s=CROWDED_S),
}


@pytest.fixture(scope="module")
def jobs(pytestconfig, tmp_path_factory) -> dict[str, Future[list[list]]]:
    """All jobs; their ranks wait at the same time."""
    todo = {name: partial(on_ranks, 3, job, str(tmp_path_factory.mktemp("masks"))) for name, job in JOBS.items()}
    return in_processes(pytestconfig, partial(on_ranks, 3, make_all_calls), todo)


@pytest.mark.parametrize("name", JOBS)
def test_a_rank_comes_back(jobs, name):
    [found] = jobs[name].result()
    if name.startswith("two"):
        assert found[0]["masked"] in (1, 2)


DECODING = [phase for phase in PHASES if phase.startswith("decode")]
LOSSES = {
    **{f"sleeps in {phase}": (sleep_in, phase) for phase in DECODING},
    f"sleeps in {DECODING[0]}, and all go on": (lose_and_go_on, DECODING[0]),
    f"never calls {DECODING[1]}, and all go on": (lose_and_go_on, DECODING[1]),
}


def work_alone(rank, threads, pair) -> None:
    work(threads, pair, CASE)


@pytest.fixture(scope="module")
def reports(pytestconfig, tmp_path_factory) -> dict[str, Future[list[list[Report]]]]:
    """By loss, what ranks 0 and 1 report; the ranks of all losses wait at the same time."""

    def todo(name: str) -> partial:
        job, phase = LOSSES[name]
        folder = str(tmp_path_factory.mktemp("loss"))
        return partial(on_ranks, 3, partial(job, loss=Loss(phase, folder, CROWDED_S, name.startswith("never"))))

    return in_processes(pytestconfig, partial(on_ranks, 3, work_alone), {name: todo(name) for name in LOSSES})


@pytest.mark.parametrize("name", LOSSES)
def test_a_lost_rank_is_named(reports, name):
    [found] = reports[name].result()
    phase = LOSSES[name][1]
    if name.startswith("never"):
        for rank in (0, 1):
            check_late(found[rank], rank, phase, CROWDED_S)
    else:
        check_both_late(found, phase, CROWDED_S)


@pytest.mark.parametrize("name", MISMATCHES)
def test_ranks_that_call_different_things(run, name):
    for rank, text in enumerate(run(3, disagree, name)):
        check_mismatch(text, rank, 3, name)


@pytest.mark.parametrize("culprit", [0, 1])
def test_decoding_goes_on_after_bad_experts(run, culprit):
    run(2, decode_with_bad_experts, culprit)
