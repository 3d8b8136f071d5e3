"""Sets of inputs on any device, and what has to come of them: as `inputs`, but quick enough for 16384 tokens.

Nothing here calls the library: a rank knows what it must receive because it can draw its peers' inputs itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.bench.core.inputs import WrongAnswer, expert
from tokenferry.errors import ConfigError

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
        hidden: H, a multiple of 128.
        top_k: K.
        experts: E.
        seed: Of the inputs.
        routing: One of `ROUTINGS`.
    """

    ranks: int
    tokens: int
    hidden: int
    top_k: int
    experts: int
    seed: int
    routing: str = "uniform"


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What one rank brings.

    Attributes:
        x: ``[T, H]`` bfloat16.
        data: ``[T, H]`` float8_e4m3fn: random bytes.
        scale: ``[T, H / 128]`` float32.
        topk_idx: ``[T, K]`` int64.
        topk_weights: ``[T, K]`` float32.
    """

    x: Tensor
    data: Tensor
    scale: Tensor
    topk_idx: Tensor
    topk_weights: Tensor


def draw(sizes: Sizes, variant: int, rank: int, device: torch.device) -> Inputs:
    """Draw the inputs of one rank: the same bits on every device of a kind.

    Raises:
        ConfigError: the routing is unknown, or H no multiple of 128.
    """
    if sizes.hidden % FP8_COLUMNS:
        raise ConfigError(f"hidden {sizes.hidden} is no multiple of {FP8_COLUMNS}, the columns of one FP8 scale")
    generator = torch.Generator(device).manual_seed((sizes.seed * 64 + variant) * 4096 + rank)
    T, H = sizes.tokens, sizes.hidden
    topk_idx = _route(sizes, torch.rand(T, sizes.experts, generator=generator, device=device))
    weights = torch.rand(T, sizes.top_k, generator=generator, device=device)
    x = torch.randn(T, H, generator=generator, device=device).bfloat16()
    data = torch.randint(0, 256, (T, H), generator=generator, device=device, dtype=torch.uint8)
    scale = torch.rand(T, H // FP8_COLUMNS, generator=generator, device=device)
    return Inputs(x, data.view(torch.float8_e4m3fn), scale, topk_idx, weights)


def _route(sizes: Sizes, uniform: Tensor) -> Tensor:
    """K distinct experts of each token, from one uniform number for each (token, expert)."""
    if sizes.routing == "uniform":
        scores = uniform
    elif sizes.routing == "skewed":  # the K largest u ** (1 / w): drawing without replacement with weights w
        scores = uniform.clamp_min(1e-30).log() * torch.arange(1, sizes.experts + 1, device=uniform.device)
    elif sizes.routing == "one-rank":
        scores = uniform.clone()
        scores[:, : max(sizes.experts // sizes.ranks, sizes.top_k)] += 1
    else:
        raise ConfigError(f"routing {sizes.routing!r} is unknown; choose one of {', '.join(ROUTINGS)}")
    return scores.topk(sizes.top_k, dim=1).indices


def sent_to(sizes: Sizes, topk_idx: Tensor) -> Tensor:
    """``[T, R]`` bool: the ranks that hold a chosen expert of each token."""
    owners = topk_idx // (sizes.experts // sizes.ranks)
    hit = torch.zeros(len(topk_idx), sizes.ranks, dtype=torch.bool, device=topk_idx.device)
    return hit.scatter_(1, owners, True)


def sources(sizes: Sizes, variant: int, device: torch.device) -> Iterator[Inputs]:
    """The inputs of every rank, one after another."""
    for source in range(sizes.ranks):
        yield draw(sizes, variant, source, device)


def data_of(inputs: Inputs) -> Tensor:
    """The FP8 rows of a source as bytes, which every device can index."""
    return inputs.data.view(torch.uint8)


def scale_of(inputs: Inputs) -> Tensor:
    """The scales of a source."""
    return inputs.scale


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """``[rows]`` bool: where all bytes of a row are the same."""
    return (a.contiguous().view(torch.uint8) == b.contiguous().view(torch.uint8)).flatten(1).all(1)


def check_rows(
    what: str, sizes: Sizes, variant: int, rank: int, got: tuple[tuple[Tensor, Callable[[Inputs], Tensor]], ...]
) -> None:
    """Check rows in the layout ROWS: every bit, by source rank, then token.

    Args:
        what: The call, for the complaint.
        sizes: Of the case.
        variant: Which set of inputs.
        rank: Who received.
        got: ``[N, ...]`` tensors, each with the tensor of a source's inputs that it holds rows of.

    Raises:
        WrongAnswer: names what differs.
    """
    begin = 0
    for source, inputs in enumerate(sources(sizes, variant, got[0][0].device)):
        here = sent_to(sizes, inputs.topk_idx)[:, rank].nonzero().flatten()
        end = begin + len(here)
        for tensor, pick in got:
            if len(tensor) < end:
                raise WrongAnswer(f"{what}: rank {rank} has {len(tensor)} rows, {end} or more were sent to it")
            wrong = int((~same_bits(tensor[begin:end], pick(inputs)[here])).sum())
            if wrong:
                raise WrongAnswer(f"{what}: {wrong} of {len(here)} rows from rank {source} are wrong on rank {rank}")
        begin = end
    for tensor, _ in got:
        if len(tensor) != begin:
            raise WrongAnswer(f"{what}: rank {rank} has {len(tensor)} rows, {begin} were sent to it")


def check_by_expert(what: str, sizes: Sizes, variant: int, rank: int, groups: list[Tensor]) -> None:
    """Check bfloat16 rows of each local expert of a rank: every bit, by source rank, then token.

    Raises:
        WrongAnswer: names what differs.
    """
    first = rank * (sizes.experts // sizes.ranks)
    expected: list[list[Tensor]] = [[] for _ in groups]
    for inputs in sources(sizes, variant, groups[0].device):
        for e, rows in enumerate(expected):
            rows.append(inputs.x[(inputs.topk_idx == first + e).any(1)])
    for e, (got, rows) in enumerate(zip(groups, expected, strict=True)):
        wanted = torch.cat(rows)
        if got.shape != wanted.shape or not bool(same_bits(got, wanted).all()):
            raise WrongAnswer(f"{what}: rows of expert {first + e} are wrong on rank {rank}")


def expected_sums(sizes: Sizes, inputs: Inputs) -> Tensor:
    """``[T, H]``: what combine must return if rank r answers ``expert(row, r)``: float32, rank order, one rounding."""
    total = torch.zeros(inputs.x.shape, device=inputs.x.device)
    for rank, here in enumerate(sent_to(sizes, inputs.topk_idx).unbind(1)):
        places = here.nonzero().flatten()
        total[places] += expert(inputs.x[places], rank).float()
    return total.bfloat16()


def remote_rows(sizes: Sizes, variants: int, rank: int, device: torch.device) -> tuple[float, float]:
    """Rows that leave this rank's GPU in dispatch, and in combine; means over the sets of inputs."""
    out = home = 0
    for variant in range(variants):
        for source, inputs in enumerate(sources(sizes, variant, device)):
            counts = sent_to(sizes, inputs.topk_idx).sum(0)
            if source == rank:
                out += int(counts.sum() - counts[rank])
            else:
                home += int(counts[rank])
    return out / variants, home / variants
