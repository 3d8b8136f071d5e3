"""Groups of threads whose kernels the emulator runs."""

from collections.abc import Callable
from typing import Any

import pytest

from support.emulated_group import emulate


@pytest.fixture
def run(pytestconfig) -> Callable[..., list[Any]]:
    """``run(R, job, *args)``: call ``job(rank, threads, pair, *args)`` in R threads."""
    return emulate(pytestconfig)
