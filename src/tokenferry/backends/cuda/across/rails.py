"""Rails: how a rank exchanges tensors with the ranks across from it, those with the same local index on other nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from tokenferry.errors import PeerTimeout
from tokenferry.transports.base import CallId
from tokenferry.transports.failures import FailureReports


class Parcel(NamedTuple):
    """Memory that is sent, or in which something arrives.

    Attributes:
        address: Where it begins.
        num_bytes: Its bytes.
    """

    address: int
    num_bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> Parcel:
        """Return the memory of a contiguous tensor."""
        return cls(tensor.data_ptr(), tensor.nbytes)


class Rows(NamedTuple):
    """Rows that lie one behind the other, in memory that somebody keeps.

    Attributes:
        address: Where the first begins.
        row_bytes: Bytes of each.
    """

    address: int
    row_bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> Rows:
        """Return those of a contiguous tensor ``[n, ...]``."""
        return cls(tensor.data_ptr(), tensor.stride(0) * tensor.element_size())

    def at(self, row: int) -> int:
        """Return the address of a row."""
        return self.address + row * self.row_bytes

    def part(self, first: int, num: int) -> Parcel:
        """Return the memory of some of them."""
        return Parcel(self.address + first * self.row_bytes, num * self.row_bytes)


Parcels = Mapping[int, Sequence[Parcel]]
"""By node, what is for or from the rank across there: in the same order and sizes on both ranks."""


class Transfer(Protocol):
    """An exchange under way."""

    def join(self) -> None:
        """Make the current stream wait until everything has come, and what was sent may be overwritten."""
        ...

    def wait(self) -> None:
        """Wait for the same on the host.

        Raises:
            PeerTimeout: a rank across from this one did not answer in time.
        """
        ...


class NoTransfer:
    """An exchange of nothing; see `Transfer`."""

    def join(self) -> None:
        """See `Transfer.join`."""

    def wait(self) -> None:
        """See `Transfer.wait`."""


class Rails(Protocol):
    """Exchanges with the ranks across from this one. They are made in the same order by all ranks of a rail.

    Attributes:
        name: What carries them.
        reports: Where a rank that gives up says for whom it waited; None: nowhere.
        lost: The error of an exchange that did not end in time; None: there is none.
    """

    name: str
    reports: FailureReports | None
    lost: PeerTimeout | None

    def exchange(self, call: CallId, send: Parcels, recv: Parcels, kept: object) -> Transfer:
        """Begin an exchange, behind the work of the current stream; returns at once.

        Args:
            call: The call that it belongs to, for error messages.
            send: What to send.
            recv: Where to receive. One of them is not empty.
            kept: Keeps the memory of both, which is kept until a stream waits for the transfer.
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
            PeerTimeout: a rank across from this one did not answer in time.
        """
        ...

    def finish(self) -> None:
        """Wait until what is under way has ended, or was given up: peers may need what this rank sends."""
        ...

    def close(self) -> None:
        """Give up what is under way. Local, idempotent."""
        ...
