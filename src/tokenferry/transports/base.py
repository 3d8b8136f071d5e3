"""What a transport is, and what all transports share: calls, messages, and who has finished reading what.

A *call* is one exchange: every rank posts one message to every other rank and takes one from each. Calls are numbered
from 1, in the same order on all ranks, but several may be under way (receive hooks) and may be taken in any order.

Buffers are reused without a message of their own to say so: each message carries its sender's *floor*, the number up to
which that rank has finished every call. What was sent in call n may be overwritten once all ranks' floors are >= n.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tokenferry.errors import PeerTimeout

HEADER_INTS = 16
"""Every message starts with this many signed 64-bit integers, whose meaning is the backend's."""


Check = Callable[[int, tuple[int, ...]], object]
"""Gets a rank and the header that it sent."""


@dataclass(frozen=True, slots=True)
class CallId:
    """One exchange: its number on the group, counted from 1, and the name it has in messages."""

    number: int
    phase: str


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """What one rank sent in one call; ``body`` (uint8, 1-D) may be read until the call is finished."""

    header: tuple[int, ...]
    body: Tensor


class Deadline:
    """A moment that a wait may not pass."""

    def __init__(self, timeout_s: float) -> None:
        self.start = time.monotonic()
        self.timeout_s = timeout_s

    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self.start + self.timeout_s - time.monotonic())

    def waited(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start


class Transport(Protocol):
    """Messages between R ranks.

    ``take`` and ``post`` raise PeerTimeout; everything else is local. No method writes into a buffer that a peer may
    still read.
    """

    name: str
    rank: int
    num_ranks: int

    def open(self, call: CallId, sizes: Sequence[int]) -> list[Tensor]:
        """Return one uint8 buffer of ``sizes[r]`` bytes per rank, to be filled before `post`; this rank's own too."""

    def post(
        self, call: CallId, headers: Sequence[tuple[int, ...]], deadline: Deadline, skip: frozenset[int] = frozenset()
    ) -> None:
        """Send header and buffer to each rank but those in ``skip``; returns when they are on their way."""

    def take(self, call: CallId, src: int, deadline: Deadline, check: Check | None = None) -> Message:
        """Wait for the message of rank ``src``; once per call and rank.

        ``check(peer, header)`` may raise; it sees every header before anything else of that message is awaited, so that
        ranks that made different calls do not wait for bodies that will never come.
        """

    def finish(self, call: CallId, deadline: Deadline | None) -> None:
        """Say that all bodies of the call have been read, or that nobody will.

        With a deadline, also wait until every peer has what this call sent, if the transport cannot vouch for that
        itself.
        Only for calls that peers, too, take at once: a peer that takes in a hook may need this rank's next call first.
        """

    def forget(self, src: int) -> None:
        """Stop expecting anything from ``src`` for the calls under way, and never reuse what it may still read."""

    def tell_number(self, number: int, skip: frozenset[int]) -> None:
        """Tell each rank but those in ``skip`` the number of this rank's last call, for `heard_number`."""

    def heard_number(self) -> int:
        """Return the highest number that a peer has told, 0 if none has; never waits."""

    def go_on_from(self, number: int) -> None:
        """Count all calls up to ``number`` as finished, and drop what is here of them."""

    def close(self, *, linger: bool) -> None:
        """Free everything; local, idempotent.

        What a hook received here may not have been received there. With ``linger`` the transport sees to it that
        peers still get what was sent, which may take a few seconds.
        """


class Floor:
    """Numbers up to which calls are finished, here and at each peer."""

    def __init__(self, num_ranks: int) -> None:
        self.mine = 0
        self._ahead: set[int] = set()
        self._peers = [0] * num_ranks

    def finish(self, number: int) -> None:
        """One call is finished here; calls may finish out of order."""
        self._ahead.add(number)
        while self.mine + 1 in self._ahead:
            self.mine += 1
            self._ahead.remove(self.mine)

    def jump(self, number: int) -> None:
        """All calls up to ``number`` are finished here, or were never made."""
        self.mine = max(self.mine, number)
        self._ahead = {later for later in self._ahead if later > self.mine}

    def heard(self, peer: int, floor: int) -> None:
        """A peer said its floor."""
        self._peers[peer] = max(self._peers[peer], floor)

    def passed(self, number: int, readers: frozenset[int]) -> bool:
        """Whether all ``readers`` have finished call ``number``."""
        return all(self._peers[peer] >= number for peer in readers)


def peer_timeout(call: CallId, rank: int, peers: Sequence[int], why: str, waited_s: float, last: str) -> PeerTimeout:
    """Word the error of a wait that failed: who waited for whom, in which call, how long, and what was last heard."""
    who = f"rank {peers[0]}" if len(peers) == 1 else f"ranks {', '.join(map(str, peers))}"
    where = f"{call.phase} #{call.number}" if call.number else call.phase
    return PeerTimeout(
        f"{where}: rank {rank} waited {waited_s:.1f} s for {who}: {why}. {last} The group is broken; see "
        "docs/errors.md#peertimeout",
        phase=call.phase,
        call=call.number,
        rank=rank,
        peers=tuple(peers),
        waited_s=waited_s,
    )


class LastHeard:
    """The last message of each peer, for error messages."""

    def __init__(self, num_ranks: int) -> None:
        self._last: list[CallId | None] = [None] * num_ranks

    def note(self, peer: int, call: CallId) -> None:
        """A message of ``peer`` was taken."""
        self._last[peer] = call

    def tell(self, peer: int) -> str:
        """A sentence about ``peer``."""
        last = self._last[peer]
        if last is None:
            return f"Rank {peer} has not been heard in this group."
        return f"Rank {peer} was last heard in {last.phase} #{last.number}."
