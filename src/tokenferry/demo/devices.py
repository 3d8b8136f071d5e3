"""Where the demo runs: on GPUs, one rank each, or on the CPU; decided from what is there, and said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenferry.errors import ConfigError
from tokenferry.types import BackendName

CPU_RANKS = 4
OLDEST = (9, 0)
"""Compute capability that backend cuda needs."""


@dataclass(frozen=True, slots=True)
class Place:
    """What was decided.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        ranks: R.
        text: What is said about it.
    """

    device: BackendName
    ranks: int
    text: str


def gpus() -> list[tuple[int, int]]:
    """Compute capability of each GPU that torch sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_capability(i) for i in range(count)]


def choose(wish: str, ranks: int | None, capabilities: Sequence[tuple[int, int]]) -> Place:
    """Decide. ``auto`` takes the GPUs if there are at least two, all of them can, and each rank gets one of its own.

    Args:
        wish: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        ranks: R, or None for a power of two that suits.
        capabilities: Of the GPUs that are there.

    Raises:
        ConfigError: ``cuda`` is wished, and no GPU can.
    """
    count, old = len(capabilities), [one for one in capabilities if one < OLDEST]
    why_not = ""
    if old:
        why_not = f"a GPU of compute capability {_dotted(min(old))} is among them, {_dotted(OLDEST)} is needed"
    elif count < 2:
        why_not = "two are needed for one rank each"
    elif ranks is not None and ranks > count:
        why_not = f"--ranks {ranks} needs as many"
    if wish == "cuda" and (old or not count):
        raise ConfigError(
            f"--device cuda: torch sees {count} GPU(s){f'; {why_not}' if old else ''}; use --device cpu; "
            "`tokenferry doctor` says more"
        )
    if wish == "cuda" or (wish == "auto" and not why_not):
        ranks = ranks or next(power for power in (8, 4, 2, 1) if power <= count)
        shared = f", which take turns on {count} GPU(s): slow" if ranks > count else f", one on each of {ranks} GPU(s)"
        return Place("cuda", ranks, f"device: cuda, {ranks} ranks{shared}")
    ranks = ranks or CPU_RANKS
    why = f" (auto: torch sees {count} GPU(s); {why_not})" if wish == "auto" else ""
    return Place("cpu", ranks, f"device: cpu, {ranks} ranks{why}")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
