"""Deadlines of decode kernels whose peer does not come."""

from __future__ import annotations

from support.virtual_ranks import MACHINE

SHORT_S = 0.2
"""Deadline of kernels whose peer never comes."""


def late_s(num_ranks: int) -> float:
    """A deadline by which all ranks but one are here."""
    return SHORT_S if num_ranks == 2 or MACHINE.device.type == "cuda" else 3.0
