"""Large round trips of a soak: rows made from token numbers, checked on their device, without a loop over tokens.

Values are small integers, so that bfloat16 and every sum of them are exact: rows of a dispatch are those of the tokens
that are routed to the rank, in order; a combine of the received rows gives each row times the number of its places.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.testing.compare import same_bits
from tokenferry.types import DispatchOptions, Layout, MoeShape, Routing

MOST_TOKENS = 2048
MOST_HIDDEN = 2048
MOST_CHOICES = 8
_LARGEST = 15
"""The largest value: sums over at most `MOST_CHOICES` places and a bias stay below 2^8, exact in bfloat16."""


@dataclass(frozen=True, slots=True)
class Large:
    """One large case; the same on all ranks.

    Attributes:
        tokens: T of each rank.
        experts: E.
        top_k: K.
        hidden: H.
        skew: Amount added to the score of the first expert; 0: all are equally likely.
        seed: Seed of the routing.
        options: Any layout; MASKED holds all rows.
    """

    tokens: tuple[int, ...]
    experts: int
    top_k: int
    hidden: int
    skew: float
    seed: int
    options: DispatchOptions

    @property
    def shape(self) -> MoeShape:
        """The sizes."""
        return MoeShape(self.experts, self.top_k, self.hidden, max(*self.tokens, 1))

    @property
    def routing(self) -> Tensor:
        """``[sum of T, K]`` int64: the choices of all ranks' tokens, distinct experts, some slots unused."""
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        scores = torch.rand(sum(self.tokens), self.experts, generator=generator, dtype=torch.float32, device="cpu")
        scores[:, 0] += self.skew
        chosen = scores.topk(self.top_k, dim=1).indices
        dropped = torch.rand(chosen.shape, generator=generator, dtype=torch.float32, device="cpu") < 0.1
        return torch.where(dropped, -1, chosen)


def draw(pick: random.Random, ranks: int) -> Large:
    """Draw any large case."""
    most = pick.choice((200, 700, MOST_TOKENS))
    local = pick.choice((1, 4, 16))
    layout = pick.choice(tuple(Layout))
    tokens = tuple(pick.randint(0, most) for _ in range(ranks))
    return Large(
        tokens=tokens,
        experts=ranks * local,
        top_k=min(pick.choice((1, 2, 6, MOST_CHOICES)), ranks * local),
        hidden=pick.choice((64, 200, 1024, MOST_HIDDEN)) if layout is not Layout.MASKED else 64,
        skew=pick.choice((0.0, 0.0, 0.5, 1.0)),
        seed=pick.randrange(1 << 30),
        options=DispatchOptions(
            layout,
            alignment=pick.choice((1, 8, 128)) if layout is Layout.EXPERTS else 1,
            counts=pick.choice(("host", "device")) if layout is not Layout.EXPERTS else "host",
            capacity=max(1, sum(tokens)) if layout is Layout.MASKED else None,
        ),
    )


def numbered(numbers: Tensor, hidden: int) -> Tensor:
    """Return ``[n, hidden]`` bfloat16: integers of magnitude 1 to 15, made from token numbers and columns."""
    columns = torch.arange(hidden, device=numbers.device, dtype=torch.int64)
    mixed = (numbers[:, None] * 2_654_435_761 + columns * 40_503) & 0xFFFFFFFF
    bits = (mixed >> 13) ^ (mixed >> 5)
    return ((bits % _LARGEST + 1) * (1 - 2 * (bits >> 6 & 1))).to(torch.bfloat16)


def round_trip(group: ExpertGroup, large: Large, num_sms: int | None) -> int:
    """Dispatch, combine and redispatch; return how many calls these are. Collective.

    Raises:
        AssertionError: a row or a sum is wrong.
    """
    device, hidden, rank = group.device, large.hidden, group.rank
    choices = large.routing.to(device)
    first = sum(large.tokens[:rank])
    mine = torch.arange(first, first + large.tokens[rank], device=device, dtype=torch.int64)
    x = numbered(mine, hidden)
    routing = Routing(choices[first : first + large.tokens[rank]].contiguous())
    sent = group.dispatch(x, routing, options=large.options, num_sms=num_sms)
    assert isinstance(sent.x, Tensor)
    group.synchronize()  # results are right once this has raised nothing
    _check_rows(f"rank {rank}, {large} dispatch", group, large, choices, sent.x)
    bias = numbered(mine + 7, hidden)
    home = group.combine(sent.x, sent.plan, bias=bias, num_sms=num_sms).x
    places = _places(large, choices, group.num_ranks)[first : first + large.tokens[rank]]
    group.synchronize()
    same_bits(f"rank {rank}, {large} combine", home, x * places[:, None].to(x.dtype) + bias)
    again = group.redispatch(x, sent.plan, num_sms=num_sms)
    assert isinstance(again.x, Tensor)
    group.synchronize()
    _check_rows(f"rank {rank}, {large} redispatch", group, large, choices, again.x)
    return 3


def _places(large: Large, choices: Tensor, num_ranks: int) -> Tensor:
    """Return ``[sum of T]``: how many rows each token has in all."""
    if large.options.layout is not Layout.ROWS:
        return (choices >= 0).sum(1)
    there = torch.where(choices >= 0, choices // (large.experts // num_ranks), num_ranks)
    hit = torch.zeros(choices.shape[0], num_ranks + 1, dtype=torch.int64, device=choices.device)
    return hit.scatter_(1, there, 1)[:, :num_ranks].sum(1)


def _check_rows(what: str, group: ExpertGroup, large: Large, choices: Tensor, x: Tensor) -> None:
    """Compare every row that holds data with that of its token."""
    local, options = large.experts // group.num_ranks, large.options
    first = group.rank * local
    chosen = (choices >= first) & (choices < first + local)
    if options.layout is Layout.ROWS:
        tokens = chosen.any(1).nonzero()[:, 0]
        same_bits(what, x[: tokens.numel()], numbered(tokens, large.hidden))
        return
    start = 0
    for expert in range(local):
        tokens = (choices == first + expert).any(1).nonzero()[:, 0]
        end = start + tokens.numel()
        rows = x[expert, : tokens.numel()] if options.layout is Layout.MASKED else x[start:end]
        same_bits(f"{what} of expert {expert}", rows, numbered(tokens, large.hidden))
        start = -(-end // options.alignment) * options.alignment
