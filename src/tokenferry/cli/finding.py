"""The findings of `tokenferry doctor`, one line each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        name: The name of the check.
        passed: Whether it passed.
        text: What was found; for a failed check, the reason and the remedy.
        required: Whether tokenferry cannot work without it.
    """

    name: str
    passed: bool
    text: str
    required: bool = False


def run_check(name: str, attempt: Callable[[], str], remedy: str, *, required: bool = False) -> Finding:
    """Run one check; an exception becomes the reason of a failed finding, followed by ``remedy``."""
    try:
        return Finding(name, True, attempt(), required)
    except Exception as error:  # noqa: BLE001 - any failure is a finding
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
        return Finding(name, False, f"{reason}; {remedy}" if remedy else reason, required)
