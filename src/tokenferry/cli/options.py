"""How options are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def positive(text: str) -> int:
    """Parse an option that has to be a positive integer.

    Raises:
        ValueError: it is none.
    """
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def positives(text: str) -> tuple[int, ...]:
    """Parse positive integers with commas between them.

    Raises:
        ValueError: one of them is none.
    """
    return tuple(positive(part) for part in text.split(","))


def one_of(*choices: str) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of words out of ``choices`` with commas between them."""

    def words(text: str) -> tuple[str, ...]:
        given = tuple(part.strip() for part in text.split(","))
        wrong = [word for word in given if word not in choices]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(choices)}")
        return given

    return words
