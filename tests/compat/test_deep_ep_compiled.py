"""Calls of buffers inside of functions that torch.compile compiles, on one rank and on two."""

import pytest
import torch

from support import compiled_jobs as jobs


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Ranks use one, and the tensors are tiny."""
    monkeypatch.setenv("TOKENFERRY_BACKEND", "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_all_dialects():
    assert jobs.other_calls(0, None) > 300


def test_low_latency():
    assert jobs.low_latency_calls(0, None) == 120


def test_low_latency_on_two_ranks(worlds):
    assert worlds(2).run(jobs.low_latency_calls) == [120, 120]
