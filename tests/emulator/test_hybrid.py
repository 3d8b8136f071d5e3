"""`HybridEPBuffer` on the CUDA backend, whose kernels the emulator runs."""

import pytest

from support import deep_ep_hybrid_jobs as jobs
from support.emulator import Emulator
from tokenferry.testing.cases import Case

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))

CASE = Case((4, 3), experts=6, top_k=3, hidden=16)


@pytest.mark.parametrize("job", [jobs.round_trips, jobs.overflows, jobs.scales])
def test_like_ranks_on_the_cpu(buffers, job):
    buffers(2, job, CASE)


def test_choices_beyond_the_limit_of_the_kernels_are_dropped_and_flagged(buffers, monkeypatch):
    monkeypatch.setattr("tokenferry.compat.deep_ep.hybrid_calls.MAX_CHOICES", 2)
    assert buffers(2, jobs.many_choices, CASE) == [1, 0]
