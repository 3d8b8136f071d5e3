"""Random inputs that every rank can draw for every rank, on any device.

Nothing here calls the library: a rank knows what it must receive because it can draw its peers' inputs itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.errors import ConfigError
from tokenferry.types import MoeShape, Quantized, Routing

FP8_COLUMNS = 128
"""Columns that share one scale."""

ROUTINGS = {
    "uniform": "every set of K experts is equally likely",
    "skewed": "expert e is drawn with a weight of 1 / (e + 1): most tokens go to the first rank",
    "one-rank": "all choices are experts of rank 0, as far as it has K",
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of one case, equal on all ranks.

    Args:
        ranks: R.
        tokens: T, on every rank.
        hidden: H.
        top_k: K.
        experts: E.
        seed: Seed of the inputs.
        routing: One of `ROUTINGS`.
    """

    ranks: int
    tokens: int
    hidden: int
    top_k: int
    experts: int
    seed: int
    routing: str = "uniform"

    def __str__(self) -> str:
        letters = f"R={self.ranks} T={self.tokens} H={self.hidden} K={self.top_k} E={self.experts}"
        return f"{letters}, seed {self.seed}"

    @property
    def local_experts(self) -> int:
        """Return the number of experts of each rank."""
        return self.experts // self.ranks

    def row_bytes(self, kind: str) -> int:
        """Return the bytes of a ``"bf16"`` row, or of an ``"fp8"`` row and its float32 scales."""
        return 2 * self.hidden if kind == "bf16" else self.hidden + 4 * -(-self.hidden // FP8_COLUMNS)

    @property
    def shape(self) -> MoeShape:
        """Return the shape of a group for this case, with M = T."""
        return MoeShape(self.experts, self.top_k, self.hidden, self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The inputs of one rank.

    Attributes:
        x: ``[T, H]`` bfloat16.
        quantized: FP8 rows of random bytes, ``[T, H]``, with scales ``[T, ceil(H / 128)]`` float32.
        topk_idx: ``[T, K]`` int64.
        topk_weights: ``[T, K]`` float32; those of a token add up to 1.
    """

    x: Tensor
    quantized: Quantized
    topk_idx: Tensor
    topk_weights: Tensor

    @property
    def routing(self) -> Routing:
        """Return choices and weights as the library takes them."""
        return Routing(self.topk_idx, self.topk_weights)


def draw(sizes: Sizes, variant: int, rank: int, device: torch.device) -> Inputs:
    """Draw the inputs of one rank: the same bits on every device of a kind.

    Raises:
        ConfigError: the routing is unknown.
    """
    generator = torch.Generator(device).manual_seed((sizes.seed * 64 + variant) * 4096 + rank)
    T, H = sizes.tokens, sizes.hidden
    topk_idx = _route(sizes, torch.rand(T, sizes.experts, generator=generator, device=device, dtype=torch.float32))
    weights = torch.rand(T, sizes.top_k, generator=generator, device=device, dtype=torch.float32)
    x = torch.randn(T, H, generator=generator, device=device, dtype=torch.float32).bfloat16()
    data = torch.randint(0, 256, (T, H), generator=generator, device=device, dtype=torch.uint8)
    scale = torch.rand(T, -(-H // FP8_COLUMNS), generator=generator, device=device, dtype=torch.float32)
    quantized = Quantized(data.view(torch.float8_e4m3fn), scale)
    return Inputs(x, quantized, topk_idx, weights / weights.sum(1, keepdim=True))


def draw_all(sizes: Sizes, variant: int, device: torch.device) -> Iterator[Inputs]:
    """Draw the inputs of every rank, one after another."""
    for source in range(sizes.ranks):
        yield draw(sizes, variant, source, device)


def _route(sizes: Sizes, uniform: Tensor) -> Tensor:
    """Choose K distinct experts of each token, from one uniform number for each (token, expert)."""
    if sizes.routing == "uniform":
        scores = uniform
    elif sizes.routing == "skewed":  # the K largest u ** (1 / w): drawing without replacement with weights w
        places = torch.arange(1, sizes.experts + 1, device=uniform.device, dtype=torch.int64)
        scores = uniform.clamp_min(1e-30).log() * places
    elif sizes.routing == "one-rank":
        scores = uniform.clone()
        scores[:, : max(sizes.local_experts, sizes.top_k)] += 1
    else:
        raise ConfigError(f"routing {sizes.routing!r} is unknown; choose one of {', '.join(ROUTINGS)}")
    return scores.topk(sizes.top_k, dim=1).indices


def sent_to(sizes: Sizes, topk_idx: Tensor) -> Tensor:
    """Return ``[T, R]`` bool: the ranks that hold a chosen expert of each token."""
    hit = torch.zeros(len(topk_idx), sizes.ranks, dtype=torch.bool, device=topk_idx.device)
    return hit.scatter_(1, topk_idx // sizes.local_experts, True)


def expert(y: Tensor, index: int) -> Tensor:
    """Return the answer of expert (or rank) ``index``: each another multiple, so that a misplaced row shows."""
    return (y.float() * (1 + index / 8)).to(y.dtype)


def remote_rows(sizes: Sizes, variants: int, rank: int, device: torch.device) -> tuple[float, float]:
    """Count the rows that leave this rank in dispatch, and in combine; means over the sets of inputs."""
    out = home = 0
    for variant in range(variants):
        for source, inputs in enumerate(draw_all(sizes, variant, device)):
            counts = sent_to(sizes, inputs.topk_idx).sum(0)
            if source == rank:
                out += int(counts.sum() - counts[rank])
            else:
                home += int(counts[rank])
    return out / variants, home / variants
