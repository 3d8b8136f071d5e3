"""The CUDA backend on SM86, emulated: no bulk copies, no conversions of FP8, and the least shared memory.

A selection of the tests of groups: each form of the kernels that copy rows, on one node and between nodes, and each
conversion.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from support import decode_jobs, throughput_jobs
from support.emulated_group import Puts, emulate
from support.emulator import Emulator
from support.fake_network import Weather
from tokenferry import MoeShape
from tokenferry.types import Quantized, Routing

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


def wide_scales(rank, threads, pair):
    """Rows whose scales leave no room for a ring; with few tokens in one kernel, with many in three."""
    for num_tokens in (3, 300):
        with pair.open(None, MoeShape(4, 1, 16, num_tokens), timeout_s=20.0) as group:
            make = torch.Generator().manual_seed(rank)
            scale = torch.randn(num_tokens, 9000, generator=make)
            index = torch.full((num_tokens, 1), 2 * rank, dtype=torch.int64)  # its own expert
            sent = group.dispatch(Quantized(torch.ones(num_tokens, 16), scale), Routing(index))
            assert sent.x.scale.equal(scale)


def test_scales_that_do_not_fit_into_shared_memory(run):
    run(2, wide_scales)


def test_overflows(run):
    run(2, throughput_jobs.overflow, 2)


def test_decode_rounds(run):
    run(2, decode_jobs.rounds, 2)


def test_decode_encodings(run):
    run(2, decode_jobs.encodings, 2)
    run(2, decode_jobs.not_finite)


def test_round_trips_across_nodes(run):
    run(4, throughput_jobs.round_trips, 4, ranks_per_node=2)


def test_decode_calls_whose_messages_are_put(run):
    """Into memory of other nodes, some of which this rank reaches, and over a network that reorders."""
    weather = Weather(delay_s=0.004, reorder=True, seed=7)
    puts = Puts(weather, lambda rank: rank % 3 == 0, MoeShape(24, 32, 1024, 8))  # no smaller than any case of the job
    run(3, decode_jobs.rounds, 3, ranks_per_node=1, puts=puts)
