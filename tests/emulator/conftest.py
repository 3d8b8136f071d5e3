"""Groups of threads whose kernels the emulator runs."""

from collections.abc import Callable
from typing import Any

import pytest

from support.emulated_group import emulate


@pytest.fixture
def run(pytestconfig) -> Callable[..., list[Any]]:
    """``run(R, job, *args)``: call ``job(rank, threads, pair, *args)`` in R threads."""
    return emulate(pytestconfig)


@pytest.fixture(params=["on", "off"])
def both_paths(request, monkeypatch) -> None:
    """Make groups whose calls may take the fast path, then groups whose calls may not."""
    monkeypatch.setenv("TOKENFERRY_FAST_PATH", request.param)
