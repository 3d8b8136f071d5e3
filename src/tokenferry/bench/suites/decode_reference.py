"""The expected results of decode calls, on any device: every bit, but for logfmt10, where a neighbouring code is right.

Nothing here calls the library: each rank draws the inputs of its peers. Experts answer with rows of one pool that every
rank has, chosen by expert and place: a row read at a wrong place, or added in a wrong order, gives another sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenferry.bench.core.checks import WrongAnswer, must_equal, same_bits
from tokenferry.bench.core.inputs import Sizes, draw_all
from tokenferry.testing.reference import beyond_a_code, encode_and_decode, fp8_cast
from tokenferry.types import DecodeDispatched, Quantized

_POOL_ROWS = 4099
"""A prime above the places of most experts, so that few of their rows are the same."""
_STRIDE, _SHIFT = 7919, 389


class Pool:
    """Rows that experts answer with, the same on all ranks: normal, each of another size.

    Args:
        sizes: Sizes of the case; only H and the seed are used.
        device: Device of the rows.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.device = device
        generator = torch.Generator(device).manual_seed(sizes.seed)
        rows = torch.randn(_POOL_ROWS, sizes.hidden, generator=generator, device=device, dtype=torch.float32)
        sizes_of_rows = torch.rand(_POOL_ROWS, 1, generator=generator, device=device, dtype=torch.float32)
        self._rows = (rows * sizes_of_rows).bfloat16()

    def rows(self, experts: Tensor, places: Tensor, shift: int) -> Tensor:
        """Return answers ``[..., H]`` bfloat16 of ``experts`` (of all ranks) at ``places``; ``shift``: which set."""
        return self._rows[(experts * _STRIDE + places + shift * _SHIFT) % _POOL_ROWS]

    def fill(self, y: Tensor, first: int, shift: int) -> None:
        """Write every row of ``y`` ``[L, places, H]``, whose experts begin with ``first``."""
        device = y.device
        experts = torch.arange(first, first + y.shape[0], device=device, dtype=torch.int64)[:, None]
        places = torch.arange(y.shape[1], device=device, dtype=torch.int64)
        index = (experts * _STRIDE + places + shift * _SHIFT) % _POOL_ROWS
        torch.index_select(self._rows, 0, index.flatten(), out=y.view(-1, y.shape[-1]))


class DecodeReference:
    """One set of inputs of all ranks, and the expected results of each call on one rank.

    Args:
        sizes: Sizes of the case.
        variant: The set of inputs.
        rank: The rank whose results are expected.
        pool: The answers of experts.
        padded: Whether ranks bring fewer tokens, each another number: the last ones choose no expert.
    """

    def __init__(self, sizes: Sizes, variant: int, rank: int, pool: Pool, *, padded: bool = False) -> None:
        self._sizes, self._rank, self._pool = sizes, rank, pool
        all_inputs = list(draw_all(sizes, variant, pool.device))
        T, E = sizes.tokens, sizes.experts
        if padded:
            for source, one in enumerate(all_inputs):
                one.topk_idx[T * (source + 2) // (sizes.ranks + 1) :] = -1
        self._all_x = torch.cat([one.x for one in all_inputs])
        self._all_idx = torch.cat([one.topk_idx for one in all_inputs])
        hits = torch.zeros(len(self._all_idx), E + 1, dtype=torch.bool, device=self._all_idx.device)
        # -1 goes to a column of its own, which is left out.
        self._hits = hits.scatter_(1, torch.where(self._all_idx < 0, E, self._all_idx), True)[:, :E]
        self._places = self._hits.cumsum(0) - 1
        mine = all_inputs[rank]
        self.x, self.topk_idx, self.topk_weights = mine.x, mine.topk_idx, mine.topk_weights
        self._cached: dict[tuple[str, str, int], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def first(self) -> int:
        """The first expert of this rank."""
        return self._rank * self._sizes.local_experts

    def rows_out(self) -> dict[str, int]:
        """Count the rows that leave this rank.

        Returns:
            dict: ``dispatch``: one for each own token and other rank; of other ranks' tokens: ``exact``: one for each
            expert here; ``fast``: one where there is any.
        """
        sizes, local = self._sizes, self._sizes.local_experts
        by_rank = self._hits.view(sizes.ranks, sizes.tokens, sizes.ranks, local)
        others = torch.arange(sizes.ranks, device=by_rank.device, dtype=torch.int64) != self._rank
        return {
            "dispatch": int(by_rank[self._rank][:, others].any(-1).sum()),
            "exact": int(by_rank[others][:, :, self._rank].sum()),
            "fast": int(by_rank[others][:, :, self._rank].any(-1).sum()),
        }

    def check_dispatch(self, what: str, sent: DecodeDispatched[Tensor | Quantized]) -> None:
        """Check rows and scales (every bit), counts and source tokens.

        Raises:
            WrongAnswer: names what differs.
        """
        self.check_received(what, sent.x, sent.expert_counts, sent.plan.src_token)

    def check_received(self, what: str, x: Tensor | Quantized, expert_counts: Tensor, src_token: Tensor) -> None:
        """Check the same of a dispatch whose results are apart; see `DecodeDispatched` and `DecodePlan`.

        Raises:
            WrongAnswer: names what differs.
        """
        local = slice(self.first, self.first + self._sizes.local_experts)
        hits = self._hits[:, local]
        must_equal(f"{what}: counts", expert_counts[:, None], hits.sum(0, dtype=torch.int32)[:, None])
        source, expert = hits.nonzero().unbind(1)
        at = expert, self._places[:, local][source, expert]
        tokens = (source % self._sizes.tokens).int()
        must_equal(f"{what}: source tokens", src_token[at][:, None], tokens[:, None])
        if isinstance(x, Quantized):
            data, scale = fp8_cast(self._all_x)
            got = {"rows": (x.data.view(torch.uint8)[at], data.view(torch.uint8)[source])}
            got["scales"] = x.scale[at], scale[source]
        else:
            got = {"rows": (x[at], self._all_x[source])}
        for name, (have, want) in got.items():
            wrong = int((~same_bits(have, want)).sum())
            if wrong:
                raise WrongAnswer(f"{what}: {wrong} of {len(source)} {name} are wrong on rank {self._rank}")

    def check_sums(self, what: str, got: Tensor, *, numerics: str, encoding: str = "same", shift: int) -> None:
        """Check weighted sums.

        Args:
            what: The call, for the message.
            got: ``[T, H]``.
            numerics: Numerics of the combine.
            encoding: Encoding of the combine.
            shift: The set of the pool's rows.

        Raises:
            WrongAnswer: names what differs.
        """
        options = (numerics, encoding, shift)
        if options not in self._cached:
            self._cached[options] = self._sums(*options)
        want, magnitude, one_code = self._cached[options]
        if encoding != "logfmt10":
            must_equal(what, got, want)
            return
        wrong = int(beyond_a_code(got, want, magnitude, one_code).sum())
        if wrong:
            raise WrongAnswer(f"{what}: {wrong} of {got.numel()} numbers are off by a code or more")

    def _sums(self, numerics: str, encoding: str, shift: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums, the magnitudes added, and the change if each number gets the next code; ``[T, H]`` each."""
        parts = self._partials(shift) if numerics == "fast" else self._products(shift)
        total = torch.zeros(self.x.shape, device=self.x.device, dtype=torch.float32)
        magnitude, one_code = total.clone(), total.clone()
        for rows, weight in parts:
            arrived = encode_and_decode(rows, encoding)
            product = arrived.values * weight
            total = total + product
            magnitude += product.abs()
            one_code += arrived.one_code * weight.abs()
        return total.bfloat16(), magnitude, one_code

    def _products(self, shift: int) -> list[tuple[Tensor, Tensor]]:
        """Return, by slot, the row of each token's expert and its weight; 0 where there is none."""
        return [self._answers(slot, self.topk_idx[:, slot : slot + 1], shift) for slot in range(self._sizes.top_k)]

    def _partials(self, shift: int) -> list[tuple[Tensor, Tensor]]:
        """Return, by rank, its experts' weighted rows added in the order of the experts, rounded once; and ones."""
        local = self._sizes.local_experts
        idx, order = self.topk_idx.sort(1)
        totals = [
            torch.zeros(self.x.shape, device=self.x.device, dtype=torch.float32) for _ in range(self._sizes.ranks)
        ]
        for slot in range(self._sizes.top_k):
            expert = idx[:, slot : slot + 1]
            row, weight = self._answers(order[:, slot : slot + 1], expert, shift)
            product = row.float() * weight
            for rank, total in enumerate(totals):
                total += torch.where((expert >= 0) & (expert // local == rank), product, 0.0)
        one = torch.ones(len(self.x), 1, device=self.x.device, dtype=torch.float32)
        return [(total.bfloat16(), one) for total in totals]

    def _answers(self, slot: Tensor | int, expert: Tensor, shift: int) -> tuple[Tensor, Tensor]:
        """Return rows ``[T, H]`` of one expert of each token, and weights ``[T, 1]``; where it is -1, both are 0."""
        there = expert >= 0
        mine = self._places[self._rank * self._sizes.tokens :][: self._sizes.tokens]
        place = mine.gather(1, expert.clamp_min(0))
        weight = self.topk_weights[:, slot : slot + 1] if isinstance(slot, int) else self.topk_weights.gather(1, slot)
        rows = self._pool.rows(expert, place, shift)[:, 0]
        return torch.where(there, rows, 0.0), torch.where(there, weight, 0.0)
