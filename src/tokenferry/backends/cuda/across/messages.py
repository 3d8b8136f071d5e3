"""What decode calls send to the rail peers: one message for each, all of one size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import ClassVar, NamedTuple

from tokenferry.backends.cuda.across.comparer import HeaderAddresses
from tokenferry.backends.cuda.across.contents import HEADER_BYTES, STATE_BYTES
from tokenferry.backends.cuda.across.crossing import Crossing
from tokenferry.backends.cuda.across.rails import Transfer
from tokenferry.backends.cuda.context import Call
from tokenferry.backends.cuda.signature import Signature


class Messages(NamedTuple):
    """Where messages for the rail peers lie, and those from them come.

    Attributes:
        mine: What this rank says about the call: ``[N, RAIL_WORDS]`` int32; 0: it has said it, and so have they.
        headers: Where what they say comes.
        sent: Bodies, rows or weights, by other node, in their order.
        came: Where those from them come.
        body_bytes: Bytes of a body.
        states: Where the states of the senders come: ``[N, 2]`` int32; 0: messages have none.
        epoch: Address of the epoch of the dispatch whose rows a combine sends; 0: it is another call.
    """

    mine: int
    headers: int
    sent: int
    came: int
    body_bytes: int
    states: int
    epoch: int


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

    def nobody_masked(self) -> bool:
        """Return whether `unreachable` returns none."""
        return True

    def unreachable(self) -> frozenset[int]:
        """Return the ranks whose experts get nothing from this rank: they, or the ranks on the way, are masked."""
        return frozenset()

    @abstractmethod
    def nodes_without(self, call: Call, has_room: bool) -> list[int]:
        """Return the nodes on which a rank has no room for the memory of a call, before anything of it is sent.

        Args:
            call: The call.
            has_room: Whether all ranks of this node have, which all of them know.

        Raises:
            MismatchError: a rail peer has made another call.
            PeerTimeout: one did not answer in time.
        """

    @abstractmethod
    def exchange(self, call: Call, messages: Messages, kept: object, patience: float) -> Transfer:
        """Begin to exchange messages with all other nodes, behind the work of the current stream; returns at once.

        Args:
            call: The call.
            messages: The messages.
            kept: Keeps their memory, which is kept until a stream waits for the transfer.
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

    def nodes_without(self, call: Call, has_room: bool) -> list[int]:
        """See `MessageRails.nodes_without`."""
        return self._crossing.nodes_without(call, has_room)

    def exchange(self, call: Call, messages: Messages, kept: object, patience: float) -> Transfer:
        """See `MessageRails.exchange`."""
        del patience  # no rank may be masked
        mine, headers, sent, came, body_bytes, states, epoch = messages
        crossing, incoming, outgoing = self._crossing, [], []
        own_state, compare = crossing.own_state, None
        if mine:  # the exchange of different calls may not end
            compare = partial(crossing.comparer.compare, call, HeaderAddresses(headers, epoch=epoch))
        for other, node in enumerate(crossing.others):
            if mine:
                incoming.append((headers + node * HEADER_BYTES, HEADER_BYTES, node, False))
                outgoing.append((mine + node * HEADER_BYTES, HEADER_BYTES, node, True))
            incoming.append((came + other * body_bytes, body_bytes, node, False))
            outgoing.append((sent + other * body_bytes, body_bytes, node, True))
            if states:
                incoming.append((states + node * STATE_BYTES, STATE_BYTES, node, False))
                outgoing.append((own_state, STATE_BYTES, node, True))
        return crossing.rails.exchange(call, incoming + outgoing, kept, compare)
