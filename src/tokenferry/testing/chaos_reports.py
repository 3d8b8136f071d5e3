"""The commands of the supervisor of a chaos soak to its ranks, and their reports."""

from __future__ import annotations

from dataclasses import dataclass

from tokenferry.testing.chaos_plan import Episode, Step


@dataclass(frozen=True, slots=True)
class Join:
    """Join the process group of a store, and prepare groups for this episode."""

    store: str
    rank: int
    ranks: int
    episode: Episode


@dataclass(frozen=True, slots=True)
class Prepare:
    """Make all that a step needs; it starts with `Go`."""

    step: Step


@dataclass(frozen=True, slots=True)
class Go:
    """Do it."""


@dataclass(frozen=True, slots=True)
class ComeBack:
    """Clear all masks; ranks do so together, between two steps."""


@dataclass(frozen=True, slots=True)
class Close:
    """Close all groups and leave the process group."""


@dataclass(frozen=True, slots=True)
class CallReport:
    """What came of a call.

    Attributes:
        name: The call.
        took_s: Seconds.
        error: The class of its exception; "" if it returned.
        expected: Whether that is a `TokenferryError`.
        text: The message, for unexpected ones the traceback.
        peers: `PeerTimeout.peers`.
        number: `PeerTimeout.call`.
    """

    name: str
    took_s: float
    error: str = ""
    expected: bool = True
    text: str = ""
    peers: tuple[int, ...] = ()
    number: int = -1


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a command.

    Attributes:
        calls: The calls that were made.
        checks: Results that were right.
        wrong: What was wrong: results, or something left behind.
        left: Whether this rank stopped in the middle of the step, as planned.
        masked: The ranks that decode calls skip.
    """

    calls: tuple[CallReport, ...] = ()
    checks: int = 0
    wrong: str = ""
    left: bool = False
    masked: frozenset[int] = frozenset()
