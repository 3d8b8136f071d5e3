"""What decode calls send to the ranks across from this one: one message for each, all of one size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from tokenferry.backends.cuda.across.crossing import Crossing
from tokenferry.backends.cuda.across.rails import Parcel, Rows, Transfer
from tokenferry.backends.cuda.context import Call
from tokenferry.backends.cuda.signature import Signature


class Messages(NamedTuple):
    """Messages for the ranks across from this one, or the memory for those from them.

    Attributes:
        headers: By node: what ranks say about the call; None: they have said it.
        bodies: By other node, in their order: rows or weights.
        states: Where the states of the senders come to, by node; None: messages have none. Not for sending.
    """

    headers: Rows | None
    bodies: Rows
    states: Rows | None = None

    def parcels(self, node: int, other: int) -> list[Parcel]:
        """Return the message of a node, the one with this number among the other ones, without its state."""
        at, num_bytes = self.bodies
        body = Parcel(at + other * num_bytes, num_bytes)
        return [body] if self.headers is None else [self.headers.part(node, 1), body]


class MessageRails(ABC):
    """What carries messages. They are exchanged in the same order by all ranks of a rail.

    Args:
        crossing: The exchanges of the other calls.
        name: What carries messages.

    Attributes:
        name: As given.
        can_mask: Whether calls can leave masked ranks out.
    """

    can_mask: ClassVar[bool] = False

    def __init__(self, crossing: Crossing, name: str) -> None:
        self.name = name
        self._crossing = crossing

    def begin(self, signature: Signature, wait_ns: int) -> Call:
        """See `Crossing.begin`."""
        return self._crossing.begin(signature, wait_ns, skip_masked=self.can_mask)

    def join(self, call: Call, transfer: Transfer, since: int) -> int:
        """See `Crossing.join`."""
        return self._crossing.join(call, transfer, since)

    @abstractmethod
    def check(self, phase: str, body_bytes: int) -> None:
        """Check that messages may have bodies of so many bytes, before anything is sent.

        Args:
            phase: The call.
            body_bytes: Bytes of a body.

        Raises:
            CapacityError: they may not; gives both numbers.
        """

    def unreachable(self) -> frozenset[int]:
        """Return the ranks whose experts get nothing from this rank: they, or the ranks on the way, are masked."""
        return frozenset()

    @abstractmethod
    def exchange(self, call: Call, send: Messages, recv: Messages, *kept: object, patience: float) -> Transfer:
        """Begin to exchange messages with all other nodes, behind the work of the current stream; returns at once.

        Args:
            call: The call.
            send: What to send.
            recv: Where to receive; its states say whether messages have one.
            kept: Keeps the memory of both, which is kept until a stream waits for the transfer.
            patience: Which part of the deadline to wait for ranks that may be masked; see
                `tokenferry.backends.cuda.patience`.
        """


class ExchangedMessages(MessageRails):
    """Messages that the rails of the other calls exchange.

    Args:
        crossing: The exchanges of the other calls.
    """

    def __init__(self, crossing: Crossing) -> None:
        super().__init__(crossing, crossing.rails.name)

    def check(self, phase: str, body_bytes: int) -> None:
        """See `MessageRails.check`: any size will do."""

    def exchange(self, call: Call, send: Messages, recv: Messages, *kept: object, patience: float) -> Transfer:
        """See `MessageRails.exchange`."""
        del patience  # no rank may be masked
        sent: dict[int, list[Parcel]] = {}
        received: dict[int, list[Parcel]] = {}
        for other, node in enumerate(self._crossing.others):
            sent[node], received[node] = send.parcels(node, other), recv.parcels(node, other)
            if recv.states is not None:
                sent[node].append(self._crossing.own_state)
                received[node].append(recv.states.part(node, 1))
        return self._crossing.exchange(call, sent, received, *kept)
