"""Routings drawn at random, for gates that have no closed formula: limited to some groups, or skewed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.cost.case import Gate
from tokenferry.errors import ConfigError
from tokenferry.types import MoeShape

_CPU = torch.device("cpu")
_NUMBERS_AT_ONCE = 1 << 21
_SCORES_PER_GROUP = 2  # DeepSeek-V3 scores a group by its two best experts, as tokenferry.nn.Router does


@dataclass(frozen=True, slots=True)
class Sampling:
    """How many tokens are drawn, and from which seed; the same arguments give the same routing.

    Args:
        num_tokens: Tokens to draw.
        seed: Seed of the generator.

    Raises:
        ConfigError: ``num_tokens`` is not positive.
    """

    num_tokens: int = 32768
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ConfigError(f"Sampling: num_tokens: expected a positive integer, got {self.num_tokens!r}")


def sample_routing(shape: MoeShape, gate: Gate, sampling: Sampling) -> Iterator[Tensor]:
    """Draw the experts of tokens, in batches of ``[n, K]`` int64.

    A token's logit of an expert is the logarithm of its popularity and Gumbel noise: the K largest are K distinct
    experts, drawn one after another in proportion to their popularity.
    """
    generator = torch.Generator(_CPU).manual_seed(sampling.seed)
    preference = log_popularity(shape.num_experts, gate, generator)
    batch = max(1, _NUMBERS_AT_ONCE // shape.num_experts)
    for start in range(0, sampling.num_tokens, batch):
        size = (min(batch, sampling.num_tokens - start), shape.num_experts)
        noise = torch.empty(size, dtype=torch.float64, device=_CPU).exponential_(generator=generator)
        yield choose(preference - noise.log(), gate, shape.top_k)


def log_popularity(num_experts: int, gate: Gate, generator: torch.Generator) -> Tensor:
    """Return the logarithm of the popularity of each expert, ``[E]`` float64."""
    order = torch.arange(1, num_experts + 1, dtype=torch.float64, device=_CPU)
    if gate.placement == "shuffled":
        order = order[torch.randperm(num_experts, generator=generator, device=_CPU, dtype=torch.int64)]
    return -gate.skew * order.log()


def choose(logits: Tensor, gate: Gate, top_k: int) -> Tensor:
    """Return the K best experts of each token in its best groups, ``[n, K]`` int64."""
    if gate.limited:
        grouped = logits.view(len(logits), gate.num_groups, -1)
        best = grouped.sigmoid().topk(min(_SCORES_PER_GROUP, grouped.shape[2]), dim=2).values.sum(2)
        opened = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(gate.top_groups, dim=1).indices, True)
        logits = grouped.masked_fill(~opened.unsqueeze(2), -torch.inf).flatten(1)
    return logits.topk(top_k, dim=1).indices


def count_hits(experts: Tensor, num_experts: int, num_places: int) -> list[int]:
    """Return how many of the tokens ``[n, K]`` have an expert at each of so many equal places, nodes or ranks."""
    places = (experts // (num_experts // num_places)).sort(dim=1).values
    first = torch.ones_like(places, dtype=torch.bool)
    first[:, 1:] = places[:, 1:] != places[:, :-1]
    counts: list[int] = places[first].bincount(minlength=num_places).tolist()
    return counts
