"""Calls inside of functions that torch.compile compiles, on the CUDA backend, whose kernels the emulator runs."""

import pytest

from support import compiled_jobs as jobs
from support.emulator import Emulator

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))


@pytest.mark.parametrize("job", [jobs.group_calls, jobs.decode_calls])
def test_calls_of_a_group(run, job):
    assert run(1, job)[0] >= 120


def test_decode_calls_across_nodes(run):
    assert run(2, jobs.decode_calls, ranks_per_node=1) == [120, 120]


@pytest.mark.parametrize("job", [jobs.other_calls, jobs.low_latency_calls])
def test_dialects_of_deep_ep(buffers, job):
    assert buffers(1, job)[0] >= 120
