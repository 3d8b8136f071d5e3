"""What DeepEP's own V1 tests do, on the CUDA backend, whose kernels the emulator runs."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from support import deep_ep_v1_jobs as jobs
from support.ambient import default_device
from support.deep_ep_v1_jobs import Sizes
from support.emulator import Emulator

pytestmark = [
    pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing())),
    pytest.mark.usefixtures("both_paths", "as_deep_ep_begins"),
]


@contextmanager
def of_a_thread(_: str) -> Iterator[torch.device]:
    with default_device("meta"):
        yield torch.device("cpu")


@pytest.fixture
def as_deep_ep_begins(monkeypatch) -> Iterator[None]:
    """Set once what belongs to the process, and in each thread what belongs to it."""
    with jobs.as_deep_ep_begins("cpu"):
        monkeypatch.setattr(jobs, "as_deep_ep_begins", of_a_thread)
        yield


@pytest.mark.parametrize("use_logfmt", [False, True])
def test_low_latency(buffers, use_logfmt):
    buffers(2, jobs.low_latency, "cpu", Sizes(tokens=1, hidden=1024, experts=2, top_k=2), use_logfmt)


def test_ranks_that_stop_in_shrink_mode(buffers):
    """Those that wait for a rank notice at once that it has destroyed its buffer, all of them."""
    buffers(6, jobs.shrinking, "cpu", Sizes(tokens=1, hidden=1024, experts=6, top_k=3))


def test_normal_mode(buffers):
    buffers(2, jobs.normal_mode, "cpu", Sizes(tokens=5, hidden=256, experts=4, top_k=2), 2)
