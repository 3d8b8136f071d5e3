"""Choose where the demo runs: on GPUs, one rank each, or on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenferry.errors import BackendUnavailable, several
from tokenferry.types import BackendName

CPU_RANKS = 4
MIN_CAPABILITY = (8, 0)
"""The lowest compute capability that backend cuda supports."""


@dataclass(frozen=True, slots=True)
class DemoDevices:
    """The devices of the demo.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        ranks: R.
        text: A line for the user about the choice.
    """

    device: BackendName
    ranks: int
    text: str


def gpu_capabilities() -> list[tuple[int, int]]:
    """Return the compute capability of each GPU that torch sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_capability(i) for i in range(count)]


def choose(requested: str, ranks: int | None, capabilities: Sequence[tuple[int, int]]) -> DemoDevices:
    """Choose the device and the number of ranks.

    ``auto`` takes the GPUs if there are at least two, backend cuda supports all, and each rank gets its own.

    Args:
        requested: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        ranks: R, or None for a power of two that fits.
        capabilities: The compute capability of each GPU.

    Raises:
        BackendUnavailable: ``cuda`` is requested, and a GPU is too old or there is none.
    """
    count, old = len(capabilities), [each for each in capabilities if each < MIN_CAPABILITY]
    why_not = ""
    if old:
        why_not = f"one has compute capability {_dotted(min(old))}, {_dotted(MIN_CAPABILITY)} is needed"
    elif count < 2:
        why_not = "at least two are needed"
    elif ranks is not None and ranks > count:
        why_not = f"--ranks {ranks} needs one for each rank"
    if requested == "cuda" and (old or not count):
        raise BackendUnavailable(
            f"--device cuda: torch sees {count} GPU(s){f'; {why_not}' if old else ''}; use --device cpu; "
            "run `tokenferry doctor` for details"
        )
    if requested == "cuda" or (requested == "auto" and not why_not):
        ranks = ranks or next(power for power in (8, 4, 2, 1) if power <= count)
        shared = f", sharing {count} GPU(s): slow" if ranks > count else f", one on each of {ranks} GPU(s)"
        return DemoDevices("cuda", ranks, f"device: cuda, {several(ranks, 'rank')}{shared}")
    ranks = ranks or CPU_RANKS
    why = f" (auto: torch sees {count} GPU(s); {why_not})" if requested == "auto" else ""
    return DemoDevices("cpu", ranks, f"device: cpu, {several(ranks, 'rank')}{why}")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
