"""The interface of a transport, and the parts that transports share: calls, messages, deadlines and watermarks.

A *call* is one exchange: every rank posts one message to every other rank and receives one from each. Calls are
numbered from 1, in the same order on all ranks, but several may be in flight (receive hooks) and may be received in any
order.

Buffers are reused without extra messages: each message carries the *watermark* of its sender, the number up to which
that rank has finished all calls, or has their messages in memory of its own. A buffer sent in call n may be overwritten
once the watermarks of its readers are at least n.

A call that stays in flight, since its hook is called late or never, holds up no other one, and costs no more than the
memory of its own messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tokenferry.errors import PeerTimeout, page_address

HEADER_INTS = 20
"""Every message starts with this many signed 64-bit integers; the backend defines what they mean."""

MOST_AWAITED = 32
"""Messages that a rank awaits from a peer at most: a call that would await more waits for the oldest before it sends.

So ranks that drop all hooks, and receive nothing, do not run ahead of peers that have yet to read what they sent.
Nobody waits for each other: the peer does not need this call to get to the one that is awaited."""

Check = Callable[[int, tuple[int, ...]], object]
"""A function that checks the header that a rank sent; it may raise."""


@dataclass(frozen=True, slots=True)
class CallId:
    """The identity of a call: its number in the group, counted from 1, and its name for error messages."""

    number: int
    phase: str


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """The message of one rank in one call; ``body`` (uint8, 1-D) may be read until the call is finished."""

    header: tuple[int, ...]
    body: Tensor


class Deadline:
    """The time at which a wait ends, ``timeout_s`` seconds from now."""

    def __init__(self, timeout_s: float) -> None:
        self.start = time.monotonic()
        self.timeout_s = timeout_s

    def left(self) -> float:
        """Return the seconds left, at least 0."""
        return max(0.0, self.start + self.timeout_s - time.monotonic())

    def waited(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.start


class Transport(Protocol):
    """The messages between R ranks.

    ``post`` and ``receive`` raise PeerTimeout; all other methods are local. No method writes into a buffer that a peer
    may still read. A forked child calls no method; a transport with descriptors of its own has them closed there
    (`tokenferry.forked`).

    Attributes:
        name: The name in the API.
        rank: This rank.
        num_ranks: R.
        order: All ranks, in the order in which to receive their messages.
    """

    name: str
    rank: int
    num_ranks: int
    order: Sequence[int]

    def open(self, call: CallId, sizes: Sequence[int]) -> list[Tensor]:
        """Return a uint8 buffer of ``sizes[r]`` bytes for each rank r, itself included, to be filled before `post`."""

    def post(
        self, call: CallId, headers: Sequence[tuple[int, ...]], deadline: Deadline, skip: frozenset[int] = frozenset()
    ) -> None:
        """Send each rank but those in ``skip`` its header and buffer; return when the sends have started."""

    def receive(self, call: CallId, src: int, deadline: Deadline, check: Check | None = None) -> Message:
        """Wait for the message of rank ``src``; once per call and rank.

        ``check(peer, header)`` may raise. It is called with each header before the body of that message is awaited, so
        that ranks that made different calls do not wait for bodies that will never come.
        """

    def finish(self, call: CallId, deadline: Deadline | None, late: frozenset[int] = frozenset()) -> None:
        """Mark a call as finished: its bodies have been read, or will not be.

        With a deadline, also wait until every peer has received the messages of this call, if the transport cannot
        guarantee that otherwise; but for those in ``late``, which receive it in a hook, and may need this rank's next
        call first.
        """

    def forget(self, call: CallId) -> None:
        """Give up a call that was posted and that nobody will receive; its messages are dropped, now or later."""

    def drop_peer(self, src: int) -> None:
        """Expect nothing more from ``src`` for the calls in flight, and never reuse a buffer that it may still read."""

    def announce_call(self, number: int, skip: frozenset[int]) -> None:
        """Send each rank but those in ``skip`` the number of this rank's last call; see `highest_announced_call`."""

    def highest_announced_call(self) -> int:
        """Return the highest number that any peer has announced, or 0, without waiting."""

    def skip_to(self, number: int) -> None:
        """Count all calls up to ``number`` as finished, and drop their messages."""

    def leave(self, why: str, *, wait: bool) -> None:
        """Tell every peer, in place of the next call's message, that this rank makes no more calls, and why.

        Then ``receive`` of that peer raises at once. Call `close` next. Raises nothing, and blocks for a few seconds at
        most, while peers are yet to make the call. Without ``wait``, tell only those that need not make it for that.
        """

    def reason(self, src: int) -> str:
        """Return why ``src`` has left, as far as it could say so without ``wait``, or an empty string; do not wait."""

    def abandon(self) -> None:
        """Make the waits of all peers for this rank fail soon; `close` follows. Raises nothing."""

    def close(self, *, linger: bool) -> None:
        """Free everything; local, idempotent.

        Peers may not yet have received a call that this rank received in a hook. With ``linger``, wait up to a few
        seconds until they have.
        """


class Watermarks:
    """The numbers up to which this rank, and each peer, has finished all calls, or has their messages for itself."""

    def __init__(self, num_ranks: int) -> None:
        self.local = 0
        self._finished_early: set[int] = set()
        self._peers = [0] * num_ranks

    def finish(self, number: int) -> None:
        """Record that this rank has finished a call; calls may finish out of order, and again."""
        if number > self.local:
            self._finished_early.add(number)
        while self.local + 1 in self._finished_early:
            self.local += 1
            self._finished_early.remove(self.local)

    def skip_to(self, number: int) -> None:
        """Record that this rank has finished, or never made, all calls up to ``number``."""
        self.local = max(self.local, number)
        self._finished_early = {later for later in self._finished_early if later > self.local}

    def update(self, peer: int, watermark: int) -> None:
        """Record the watermark in a message of ``peer``; an older one changes nothing."""
        self._peers[peer] = max(self._peers[peer], watermark)

    def reached(self, number: int, readers: frozenset[int]) -> bool:
        """Return whether all ``readers`` have finished call ``number``."""
        return all(self._peers[peer] >= number for peer in readers)


def peer_timeout(call: CallId, rank: int, peers: Sequence[int], why: str, waited_s: float, last: str) -> PeerTimeout:
    """Return the `PeerTimeout` for a failed wait.

    Its message names the call, the waiting rank, the missing peers, the time waited and the last message (``last``: a
    sentence, or nothing).
    """
    who = f"rank {peers[0]}" if len(peers) == 1 else f"ranks {', '.join(map(str, peers))}"
    where = f"{call.phase} #{call.number}" if call.number else call.phase
    sentences = (f"{where}: rank {rank} waited {waited_s:.1f} s for {who}: {why.removesuffix('.')}.", last, advice())
    return PeerTimeout(
        " ".join(filter(None, sentences)),
        phase=call.phase,
        call=call.number,
        rank=rank,
        peers=tuple(peers),
        waited_s=waited_s,
    )


def advice() -> str:
    """Return the last sentence of the message of a `PeerTimeout`."""
    places = ("`tokenferry explain-error PeerTimeout`", page_address("errors", "peertimeout"))
    return f"The group is broken; {' and '.join(filter(None, places))} {'say' if places[1] else 'says'} what to do"


class LastMessages:
    """The call of the last message from each peer, for error messages."""

    def __init__(self, num_ranks: int) -> None:
        self._calls: list[CallId | None] = [None] * num_ranks

    def record(self, peer: int, call: CallId) -> None:
        """Record that a message of ``peer`` was received."""
        self._calls[peer] = call

    def describe(self, peer: int) -> str:
        """Return a sentence about the last message from ``peer``."""
        last = self._calls[peer]
        if last is None:
            return f"Nothing was received from rank {peer} before."
        return f"The last message from rank {peer} was received in {last.phase} #{last.number}."
