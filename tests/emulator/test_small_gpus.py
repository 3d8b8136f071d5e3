"""The CUDA backend on SM86, emulated: no bulk copies, no conversions of FP8, and the least shared memory.

A selection of the tests of groups: each form of the kernels that copy rows, and each conversion.
"""

from collections.abc import Callable
from typing import Any

import pytest

from support import decode_jobs, throughput_jobs
from support.emulated_group import emulate
from support.emulator import Emulator

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))


@pytest.fixture
def run(pytestconfig) -> Callable[..., list[Any]]:
    """``run(R, job, *args)``: call ``job(rank, threads, pair, *args)`` in R threads."""
    return emulate(pytestconfig, arch="sm_86")


@pytest.mark.parametrize("ranks", [1, 3])
def test_round_trips(run, ranks):
    run(ranks, throughput_jobs.round_trips, ranks)


def test_quantized_rows(run):
    run(2, throughput_jobs.quantized_rows, 2)


def test_overflows(run):
    run(2, throughput_jobs.overflow, 2)


def test_decode_rounds(run):
    run(2, decode_jobs.rounds, 2)


def test_decode_encodings(run):
    run(2, decode_jobs.encodings, 2)
    run(2, decode_jobs.not_finite)
