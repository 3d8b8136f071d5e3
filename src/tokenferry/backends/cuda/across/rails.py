"""Rails: how a rank exchanges tensors with its rail peers, the ranks with the same local index on other nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tokenferry.backends.cuda.context import Call
from tokenferry.errors import PeerTimeout, TokenferryError
from tokenferry.transports.base import CallId
from tokenferry.transports.failures import FailureReports

Part = tuple[int, int, int, bool]
"""Memory that is sent, or in which something arrives: address, bytes, the node of the other rank, whether it is sent.

A plain tuple: each exchange has several, and named ones take the host several times as long to make.
"""
Parts = Sequence[Part]
"""Those of an exchange. What is for a node is in the order, and in the sizes, in which the rail peer receives it."""


Compare = Callable[[], TokenferryError | None]
"""Returns the error if ranks have made different calls, as far as what they say has come; reads it from the device."""


def between_nodes(call: Call) -> CallId:
    """Return the name of a call in errors of its exchanges."""
    return CallId(call.number, f"{call.signature.phase} (between nodes)")


class Transfer(Protocol):
    """An exchange under way."""

    def join(self) -> None:
        """Make the current stream wait until everything has come, and what was sent may be overwritten."""
        ...

    def wait(self) -> None:
        """Wait for the same on the host.

        Raises:
            PeerTimeout: a rail peer did not answer in time.
        """
        ...


class Rails(Protocol):
    """Exchanges with the rail peers. They are made in the same order by all ranks of a rail.

    Attributes:
        name: What carries them.
        reports: Where a rank that gives up says for whom it waited; None: nowhere.
        lost: The error of an exchange that did not end in time; None: there is none.
        mismatch: Why it did not, if ranks have made different calls; None: nothing is known of that.
    """

    name: str
    reports: FailureReports | None
    lost: PeerTimeout | None
    mismatch: TokenferryError | None

    def exchange(self, call: Call, parts: Parts, kept: object, compare: Compare | None = None) -> Transfer:
        """Begin an exchange, behind the work of the current stream; returns at once.

        Args:
            call: The call that it belongs to, for error messages.
            parts: What to send, and where to receive; not empty.
            kept: Keeps their memory, which is kept until a stream waits for the transfer.
            compare: If the parts of different calls have different sizes, so that this may not end: called while it
                lasts, from a thread.
        """
        ...

    def end_soon_if(self, mismatched: Callable[[], bool]) -> None:
        """Let exchanges end soon, and not at the deadline, once ranks are known to have made different calls.

        Args:
            mismatched: Returns whether they are.
        """
        ...

    def raise_lost(self) -> None:
        """Raise the error of an earlier exchange that did not end in time, if there is one.

        Raises:
            PeerTimeout: a rail peer did not answer in time.
        """
        ...

    def finish(self) -> None:
        """Wait until what is under way has ended, or was given up: peers may need what this rank sends."""
        ...

    def close(self) -> None:
        """Give up what is under way. Local, idempotent."""
        ...
