"""Ranks whose processes end, on the CUDA backend, on the emulator: the others do not wait for their deadline."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from support.emulator import Emulator
from support.ended_ranks import (
    Ending,
    check_ended,
    end_in,
    go_on_after_an_end,
    note_end,
    receive_from_a_rank_that_has_ended,
)
from support.lost_ranks import PHASES
from support.masks import Absence
from tokenferry import ExpertGroup

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


ABSENCES = [Absence(first, hook) for first in ("dispatch", "combine") for hook in (False, True)]


@pytest.mark.parametrize("absence", ABSENCES, ids=str)
def test_decoding_goes_on_without_a_rank_that_has_ended(run, tmp_path, absence):
    run(3, go_on_after_an_end, Ending(str(tmp_path), tell=note_end), absence)


def test_decoding_goes_on_without_a_rank_that_has_closed(run, tmp_path):
    run(3, go_on_after_an_end, Ending(str(tmp_path), end=ExpertGroup.close), ABSENCES[0])


@pytest.mark.parametrize("on_timeout", ["raise", "mask"])
def test_what_a_rank_has_sent_before_its_end_is_received(run, tmp_path, on_timeout):
    run(3, receive_from_a_rank_that_has_ended, str(tmp_path), on_timeout)
