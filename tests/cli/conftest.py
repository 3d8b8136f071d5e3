"""Terminals, with rich and where it is not installed."""

import io
import sys
from types import SimpleNamespace

import pytest

from tokenferry.cli import screen


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
