"""Parsers and checks of options."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable

from tokenferry.bench.core.inputs import FP8_COLUMNS
from tokenferry.errors import ConfigError
from tokenferry.types import MAX_SIZE

SIZES = {
    "ranks": "number of ranks, R",
    "tokens": "tokens of each rank, T",
    "hidden": "width of a row, H",
    "top_k": "experts of each token, K",
    "experts": "number of experts, E",
}
"""What options of sizes are, with the letters that tables and documents use."""


def positive(text: str) -> int:
    """Parse an option that has to be a positive integer, no larger than a size can be.

    Raises:
        ArgumentTypeError: it is not one, or too large.
    """
    value = _whole(text)
    if value is None or value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, such as 8, got {text!r}")
    if value > MAX_SIZE:
        raise argparse.ArgumentTypeError(f"{text} is above {MAX_SIZE}, the largest size")
    return value


def seed(text: str) -> int:
    """Parse a seed: 0 .. 2^39 - 1, since those of layers, which are a little larger, end at 2^40 - 1.

    Raises:
        ArgumentTypeError: it is not one.
    """
    value = _whole(text)
    if value is None or not 0 <= value < 1 << 39:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {(1 << 39) - 1}, got {text!r}")
    return value


def integer(text: str) -> int:
    """Parse an integer.

    Raises:
        ArgumentTypeError: it is not one.
    """
    value = _whole(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}")
    return value


def number(text: str) -> float:
    """Parse a number; whoever uses it checks its range.

    Raises:
        ArgumentTypeError: it is not one.
    """
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def _whole(text: str) -> int | None:
    """Return an integer, or None if it is none."""
    try:
        return int(text)
    except ValueError:
        return None


def positives(text: str) -> tuple[int, ...]:
    """Parse positive integers with commas between them.

    Raises:
        ArgumentTypeError: one of them is none.
    """
    return tuple(positive(part) for part in text.split(","))


def one_of(*choices: str) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of words out of ``choices`` with commas between them."""

    def words(text: str) -> tuple[str, ...]:
        given = tuple(part.strip() for part in text.split(","))
        wrong = [word for word in given if word not in choices]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not one of {', '.join(choices)}")
        return given

    return words


def check_experts(args: argparse.Namespace, ranks: int) -> None:
    """Check that ``--experts`` and ``--top-k`` fit R ranks.

    Raises:
        ConfigError: they do not.
    """
    if args.experts % ranks:
        raise ConfigError(f"--experts {args.experts} is no multiple of --ranks {ranks}; change one of them")
    if args.top_k > args.experts:
        raise ConfigError(f"--top-k {args.top_k} exceeds --experts {args.experts}; choose at most as many")


def check_fp8(args: argparse.Namespace) -> None:
    """Check that rows of ``--hidden`` numbers can be cast to FP8.

    Raises:
        ConfigError: they cannot.
    """
    if args.hidden % FP8_COLUMNS:
        raise ConfigError(f"--hidden {args.hidden} is no multiple of {FP8_COLUMNS}, the columns of one FP8 scale")


def seed_of(args: argparse.Namespace) -> int:
    """Return ``--seed``, or another one each time."""
    return secrets.randbits(31) if args.seed is None else int(args.seed) % 2**31
