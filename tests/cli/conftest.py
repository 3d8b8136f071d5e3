"""Terminals, with rich and where it is not installed; phases of the benchmark."""

import io
import sys
from types import SimpleNamespace

import pytest

from support import limits_jobs
from tokenferry.cli import bench_cuda, screen


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def without_rich(monkeypatch):
    """Make every import of rich fail."""
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)


@pytest.fixture
def terminal(monkeypatch):
    """Standard output is a wide terminal."""
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    # Not sys.stdout itself: pytest exchanges that between setting up and running a test.
    monkeypatch.setattr(screen, "sys", SimpleNamespace(stdout=stream))
    return stream


@pytest.fixture(params=["rich", "plain"])
def any_terminal(request, terminal):
    """Standard output is a terminal, with rich and without."""
    if request.param == "plain":
        request.getfixturevalue("without_rich")
    return terminal


@pytest.fixture
def phases(monkeypatch):
    """Phases of `tokenferry bench` on GPUs, which a test may replace; links are not measured."""
    table = dict(bench_cuda.PHASES, limits=bench_cuda.Phase(limits_jobs.stand_in, 60.0, "links"))
    monkeypatch.setattr(bench_cuda, "PHASES", table)
    return table
