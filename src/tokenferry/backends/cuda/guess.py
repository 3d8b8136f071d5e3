"""How many rows a dispatch will bring where M does not say it: a guess from what the last ones brought.

Rows can only move before the host knows the counts if there are blocks for them. Every rank learns with the counts how
many rows the fullest rank receives, so all ranks make the same guess, without asking each other. It limits the rows of
every rank, whatever room that rank has: with more, all ranks abort the call alike and make it again, without a guess.
"""

from __future__ import annotations

from collections import deque

_RECENT = 16
"""Dispatches that a guess considers."""
_LEAST_STEP = 64


class RowGuess:
    """The guess for dispatches that have the same signature.

    Attributes:
        num_rows: Rows of any rank, for which the next dispatch has space.
    """

    __slots__ = ("_recent", "num_rows")

    def __init__(self) -> None:
        self._recent: deque[int] = deque(maxlen=_RECENT)
        self.num_rows = 0

    def note(self, most_received: int) -> None:
        """Note how many rows the fullest rank has received."""
        self._recent.append(most_received)
        num_rows = max(self._recent) * 5 // 4
        # In steps of a sixteenth to an eighth: a block of the same size takes the place of the last one without a
        # search, and a new guess needs a form of its own.
        step = max(_LEAST_STEP, 1 << num_rows.bit_length() >> 4)
        self.num_rows = (num_rows // step + 1) * step
