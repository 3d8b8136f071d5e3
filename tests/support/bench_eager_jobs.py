"""Jobs of ranks for the tests of eager calls."""

from unittest import mock

from support.bench_jobs import FEW_CALLS
from tokenferry.bench.suites import eager, host_time


def measure_eager(session):
    """`eager.measure_eager` with few calls."""
    with mock.patch.object(host_time, "CALLS", FEW_CALLS), mock.patch.object(eager, "CALLS", FEW_CALLS):
        eager.measure_eager(session)
