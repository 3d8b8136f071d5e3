"""Models that reach their experts in several ways: results and gradients compared, then times taken in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenferry.bench.core.checks import WrongAnswer
from tokenferry.bench.core.session import Session
from tokenferry.bench.core.wall import Seconds
from tokenferry.nn.sharding import local_part

STEPS = 5
"""Steps of a run back to back."""

TURNS = 2
"""How often models are measured in turns; each time as often as the settings say."""


@dataclass(frozen=True, slots=True)
class Precision:
    """The numbers of a model, and how far the results of two may be apart: norm of the difference over the norm.

    Attributes:
        dtype: Of rows and weights, or of the products alone.
        bound: Most of a loss or a gradient: sums are added, and rounded, in another order.
    """

    dtype: torch.dtype
    bound: float

    @property
    def name(self) -> str:
        """``"bfloat16"`` for ``torch.bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    def check(self, name: str, own: str, differ_by: Mapping[str, float]) -> None:
        """Check how far the results of a model are from those of another.

        Raises:
            WrongAnswer: too far.
        """
        wrong = {what: by for what, by in differ_by.items() if not by <= self.bound}
        if wrong:
            raise WrongAnswer(f"{name} differs from {own} in {self.name} by more than {self.bound}: {wrong}")


def take_gradients(model: nn.Module, kinds: Mapping[str, str]) -> dict[str, Tensor]:
    """Return this rank's part of the gradients of all weights, put together by kind, and reset them.

    Args:
        model: The model, after a backward.
        kinds: The kind of weights whose name contains a key; the first one counts, and ``""`` is in every name.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, weight in model.named_parameters():
        kind = next(kind for part, kind in kinds.items() if part in name)
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad  # an expert may get no token
        parts.setdefault(kind, []).append(local_part(grad).flatten())
    model.zero_grad()
    return {kind: torch.cat(grads) for kind, grads in parts.items()}


def in_turns(session: Session, measures: Mapping[str, Callable[[], Seconds]]) -> dict[str, dict[str, object]]:
    """Measure models one after the other, `TURNS` times, since the speed of a host changes within seconds. Collective.

    Args:
        session: The session.
        measures: What measures a model, by its name.

    Returns:
        dict: The summaries of the times of all turns, by name and mode.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in measures}
    for _ in range(TURNS):
        for name, measure in measures.items():
            for mode, times in measure().items():
                seconds[name].setdefault(mode, []).extend(times)
    return {name: session.summaries(modes) for name, modes in seconds.items()}
