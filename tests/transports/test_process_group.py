"""ProcessGroupTransport without a process group: what the contract suite cannot observe."""

from datetime import timedelta
from types import SimpleNamespace

import pytest

from tokenferry.errors import PeerTimeout
from tokenferry.transports.base import CallId, Deadline
from tokenferry.transports.process_group import ProcessGroupTransport

CALL = CallId(1, "test")


class Receive:
    """A receive whose message has come, but that gloo ends only after a moment; or one that fails."""

    def __init__(self, error: str = "") -> None:
        self.error = error

    def wait(self, timeout: timedelta) -> None:
        if self.error or timeout < timedelta(milliseconds=50):
            raise RuntimeError(self.error or "Timed out waiting 1ms for recv operation to complete")


@pytest.fixture
def transport() -> ProcessGroupTransport:
    return ProcessGroupTransport(SimpleNamespace(rank=lambda: 0, size=lambda: 2))


def test_what_came_in_time_is_found_by_a_rank_that_looks_too_late(transport):
    """A rank may be stopped while it waits, and go on when its deadline has passed: its peers did answer."""
    transport._wait(Receive(), CALL, 1, Deadline(0.0))


@pytest.mark.parametrize(
    ("error", "why"),
    [("Timed out waiting 100ms", "no answer within timeout_s"), ("Connection closed by peer", "its connection failed")],
)
def test_after_the_deadline_too_an_error_says_what_happened(transport, error, why):
    with pytest.raises(PeerTimeout, match=why):
        transport._wait(Receive(error), CALL, 1, Deadline(0.0))
