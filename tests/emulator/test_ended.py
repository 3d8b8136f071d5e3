"""Ranks whose processes end, on the CUDA backend, on the emulator: the others do not wait for their deadline."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest
import torch

from support.emulated_group import in_processes, on_ranks
from support.emulator import Emulator
from support.ended_ranks import (
    End,
    Ending,
    check_ended,
    end_in,
    go_on_after_an_end,
    note_end,
    receive_from_a_rank_that_has_ended,
)
from support.lost_ranks import CASE, PHASES
from support.masks import Absence, make_all_calls
from tokenferry import DispatchOptions, ExpertGroup, Routing

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))

OTHER_LAYOUTS = ("combine of EXPERTS", "dispatch of MASKED")


def test_calls_end_with_the_process_of_a_peer(run, tmp_path_factory):
    """In each phase; the ranks of all phases wait at the same time."""
    phases = (*PHASES, *OTHER_LAYOUTS)
    endings = [Ending(str(tmp_path_factory.mktemp("end")), tell=note_end) for _ in phases]
    with ThreadPoolExecutor(len(phases)) as pool:
        results = pool.map(lambda ending, phase: run(3, end_in, ending, phase), endings, phases)
        for phase, reports in zip(phases, results, strict=True):
            for rank in (0, 1):
                check_ended(reports[rank], rank, phase)


@pytest.mark.parametrize("phase", ["combine", "decode_dispatch"])
def test_calls_end_when_a_peer_closes_the_group(run, tmp_path, phase):
    reports = run(3, end_in, Ending(str(tmp_path), end=ExpertGroup.close), phase)
    for rank in (0, 1):
        check_ended(reports[rank], rank, phase, "it closed the group")


def close_after_an_error(group: ExpertGroup) -> None:
    """Close a group whose kernels have found a bad index, about which nobody has asked."""
    x, good = torch.ones(2, CASE.shape.hidden), torch.zeros(2, CASE.shape.top_k, dtype=torch.int64)
    group.dispatch(x, Routing(good + CASE.shape.num_experts), options=DispatchOptions(counts="device"))
    group.close()


def test_calls_end_when_a_peer_closes_the_group_after_a_bad_call(run, tmp_path):
    """The kernel that finds a bad index stops its rank, and tells nobody."""
    reports = run(3, end_in, Ending(str(tmp_path), end=close_after_an_error), "dispatch")
    for rank in (0, 1):
        check_ended(reports[rank], rank, "dispatch", "it closed the group")


ABSENCES = [Absence(first, hook) for first in ("dispatch", "combine") for hook in (False, True)]


CLOSED = "closed"


@pytest.fixture(scope="module")
def goings_on(pytestconfig, tmp_path_factory) -> dict[Absence | str, Future[list[list[None]]]]:
    """By what misses the rank that ends, or closes its group, how the others go on; all jobs run at the same time."""

    def job(absence: Absence, **how: End) -> partial:
        return partial(on_ranks, 3, go_on_after_an_end, Ending(str(tmp_path_factory.mktemp("end")), **how), absence)

    jobs = {absence: job(absence, tell=note_end) for absence in ABSENCES}
    jobs[CLOSED] = job(ABSENCES[0], end=ExpertGroup.close)
    return in_processes(pytestconfig, partial(on_ranks, 3, make_all_calls), jobs)


@pytest.mark.parametrize("absence", ABSENCES, ids=str)
def test_decoding_goes_on_without_a_rank_that_has_ended(goings_on, absence):
    goings_on[absence].result()


def test_decoding_goes_on_without_a_rank_that_has_closed(goings_on):
    goings_on[CLOSED].result()


@pytest.mark.parametrize("on_timeout", ["raise", "mask"])
def test_what_a_rank_has_sent_before_its_end_is_received(run, tmp_path, on_timeout):
    run(3, receive_from_a_rank_that_has_ended, str(tmp_path), on_timeout)
