"""Jobs of ranks for the tests of eager calls."""

from unittest import mock

import torch

from support.bench_jobs import FEW_CALLS, damaged
from tokenferry.api import ExpertGroup
from tokenferry.bench.suites import eager, host_time


def measure_eager(session):
    """`eager.measure_eager` with few calls."""
    with mock.patch.object(host_time, "CALLS", FEW_CALLS), mock.patch.object(eager, "CALLS", FEW_CALLS):
        eager.measure_eager(session)


def wrong_redispatch(session):
    """`measure_eager` in which a dispatch with its plan kept delivers a wrong row, on rank 1 only."""
    right = ExpertGroup.redispatch

    def redispatch(self, *args, **kwargs):
        result = right(self, *args, **kwargs)
        if session.rank == 1:
            with torch.no_grad():
                damaged(result.x)
        return result

    with mock.patch.object(ExpertGroup, "redispatch", redispatch):
        measure_eager(session)
