"""What the doctor finds: one line each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One line.

    Attributes:
        name: What was tried.
        good: It works.
        text: What was seen; if it does not work, why, and what to do.
        needed: Without it nothing works.
    """

    name: str
    good: bool
    text: str
    needed: bool = False


def tried(name: str, attempt: Callable[[], str], remedy: str, *, needed: bool = False) -> Finding:
    """Try something; whatever stops it becomes the reason, and ``remedy`` what to do."""
    try:
        return Finding(name, True, attempt(), needed)
    except Exception as error:  # noqa: BLE001 - whatever stops it is what the doctor has to tell
        first = str(error).strip().splitlines()
        told = f"{type(error).__name__}: {first[0] if first else ''}"
        return Finding(name, False, f"{told}; {remedy}" if remedy else told, needed)
