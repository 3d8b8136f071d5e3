"""What decode calls have to deliver, on any device: every bit, but for logfmt10, where neighbouring codes will do.

Nothing here calls the library: each rank draws what its peers bring. Experts answer with rows of one pool that every
rank has, chosen by expert and place: whoever looks at a wrong place, or adds in a wrong order, gets another sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.bench.core.inputs import WrongAnswer, must_equal
from tokenferry.bench.core.static_inputs import FP8_COLUMNS, Sizes, draw, same_bits
from tokenferry.types import DecodeDispatched, Quantized

GROUP = FP8_COLUMNS
"""Columns that share a scale, or a logarithmic range."""

_POOL_ROWS = 4099
"""A prime above the places of most experts, so that few of their rows are the same."""
_STRIDE, _SHIFT = 7919, 389
_FP8_MAX = 448.0
_LOG_STEPS, _LOG_RANGE = 510, 32.0
_HALF_WAY = 0.01
"""Part of the numbers that may be half-way between two codes."""


class Pool:
    """Rows that experts answer with, the same on all ranks: normal, each of another size.

    Args:
        sizes: Of them, H and the seed count.
        device: Where.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.device = device
        generator = torch.Generator(device).manual_seed(sizes.seed)
        rows = torch.randn(_POOL_ROWS, sizes.hidden, generator=generator, device=device)
        self._rows = (rows * torch.rand(_POOL_ROWS, 1, generator=generator, device=device)).bfloat16()

    def rows(self, experts: Tensor, places: Tensor, shift: int) -> Tensor:
        """``[..., H]`` bfloat16: what ``experts`` (of all ranks) answer at ``places``; ``shift`` chooses among sets."""
        return self._rows[(experts * _STRIDE + places + shift * _SHIFT) % _POOL_ROWS]

    def fill(self, y: Tensor, first: int, shift: int) -> None:
        """Write every row of ``y`` ``[L, places, H]``, whose experts begin with ``first``."""
        device = y.device
        experts = torch.arange(first, first + y.shape[0], device=device)[:, None]
        index = (experts * _STRIDE + torch.arange(y.shape[1], device=device) + shift * _SHIFT) % _POOL_ROWS
        torch.index_select(self._rows, 0, index.flatten(), out=y.view(-1, y.shape[-1]))


@dataclass(frozen=True, slots=True)
class Encoding:
    """What a row is after it travelled.

    Attributes:
        values: ``[n, H]`` float32.
        slack: ``[n, H]`` or ``[]`` float32: how far the next code is; 0 where every bit counts.
    """

    values: Tensor
    slack: Tensor


class Truth:
    """One set of inputs of all ranks, and what each call has to make of it, on one rank.

    Args:
        sizes: Of the case.
        variant: Which set of inputs.
        rank: Whose results.
        pool: What experts answer with.
        padded: Whether ranks bring fewer tokens, each another number: the last ones choose no expert.
    """

    def __init__(self, sizes: Sizes, variant: int, rank: int, pool: Pool, *, padded: bool = False) -> None:
        self._sizes, self._rank, self._pool = sizes, rank, pool
        everybody = [draw(sizes, variant, source, pool.device) for source in range(sizes.ranks)]
        T, E = sizes.tokens, sizes.experts
        if padded:
            for source, one in enumerate(everybody):
                one.topk_idx[T * (source + 2) // (sizes.ranks + 1) :] = -1
        self._all_x = torch.cat([one.x for one in everybody])
        self._all_idx = torch.cat([one.topk_idx for one in everybody])
        hits = torch.zeros(len(self._all_idx), E + 1, dtype=torch.bool, device=self._all_idx.device)
        # -1 goes to a column of its own, which is left out.
        self._hits = hits.scatter_(1, torch.where(self._all_idx < 0, E, self._all_idx), True)[:, :E]
        self._places = self._hits.cumsum(0) - 1
        mine = everybody[rank]
        self.x, self.topk_idx, self.topk_weights = mine.x, mine.topk_idx, mine.topk_weights
        self._sums: dict[tuple[str, str, int], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def first(self) -> int:
        """The first expert of this rank."""
        return self._rank * self._sizes.experts // self._sizes.ranks

    def rows_out(self) -> dict[str, int]:
        """Rows that leave this rank's GPU.

        Returns:
            dict: ``dispatch``: one for each own token and other rank; of other ranks' tokens: ``exact``: one for each
            expert here; ``fast``: one where there is any.
        """
        sizes, local = self._sizes, self._sizes.experts // self._sizes.ranks
        by_rank = self._hits.view(sizes.ranks, sizes.tokens, sizes.ranks, local)
        others = torch.arange(sizes.ranks, device=by_rank.device) != self._rank
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
        local = slice(self.first, self.first + self._sizes.experts // self._sizes.ranks)
        hits = self._hits[:, local]
        must_equal(f"{what}: counts", sent.expert_counts[:, None], hits.sum(0, dtype=torch.int32)[:, None])
        source, expert = hits.nonzero().unbind(1)
        at = expert, self._places[:, local][source, expert]
        tokens = (source % self._sizes.tokens).int()
        must_equal(f"{what}: source tokens", sent.plan.src_token[at][:, None], tokens[:, None])
        if isinstance(sent.x, Quantized):
            data, scale = fp8_cast(self._all_x)
            got = {"rows": (sent.x.data.view(torch.uint8)[at], data.view(torch.uint8)[source])}
            got["scales"] = sent.x.scale[at], scale[source]
        else:
            got = {"rows": (sent.x[at], self._all_x[source])}
        for name, (have, want) in got.items():
            wrong = int((~same_bits(have, want)).sum())
            if wrong:
                raise WrongAnswer(f"{what}: {wrong} of {len(source)} {name} are wrong on rank {self._rank}")

    def check_sums(self, what: str, got: Tensor, options: tuple[str, str, int]) -> None:
        """Check weighted sums.

        Args:
            what: The call, for the complaint.
            got: ``[T, H]``.
            options: Numerics, encoding, and the set of the pool's rows.

        Raises:
            WrongAnswer: names what differs.
        """
        if options not in self._sums:
            self._sums[options] = self._added_up(*options)
        want, slack, size = self._sums[options]
        if options[1] != "logfmt10":
            must_equal(what, got, want)
            return
        # A number half-way between two codes takes either, since logarithms differ in their last bits; few are.
        off = (got.float() - want.float()).abs()
        fine = size * 2.0**-16 + want.float().abs() * torch.finfo(want.dtype).eps
        other, wrong = int((off > fine).sum()), int((~(off <= fine + 1.01 * slack)).sum())
        if wrong or other > max(2, _HALF_WAY * off.numel()):
            raise WrongAnswer(
                f"{what}: {wrong} of {off.numel()} numbers are further off than a code, {other} by up to a code"
            )

    def _added_up(self, numerics: str, encoding: str, shift: int) -> tuple[Tensor, Tensor, Tensor]:
        """``[T, H]`` each: the sums; by how much they change if each number gets the next code; the magnitudes."""
        parts = self._partials(shift) if numerics == "fast" else self._products(shift)
        total = torch.zeros(self.x.shape, device=self.x.device)
        slack, size = total.clone(), total.clone()
        for rows, weight in parts:
            sent = encoded_row(rows, encoding)
            product = sent.values * weight
            total = total + product
            slack += sent.slack * weight.abs()
            size += product.abs()
        return total.bfloat16(), slack, size

    def _products(self, shift: int) -> list[tuple[Tensor, Tensor]]:
        """By slot: the row of each token's expert and its weight; 0 where there is none."""
        return [self._answers(slot, self.topk_idx[:, slot : slot + 1], shift) for slot in range(self._sizes.top_k)]

    def _partials(self, shift: int) -> list[tuple[Tensor, Tensor]]:
        """By rank: its experts' weighted rows in the order of the experts, rounded once; and ones."""
        local = self._sizes.experts // self._sizes.ranks
        idx, order = self.topk_idx.sort(1)
        totals = [torch.zeros(self.x.shape, device=self.x.device) for _ in range(self._sizes.ranks)]
        for slot in range(self._sizes.top_k):
            expert = idx[:, slot : slot + 1]
            row, weight = self._answers(order[:, slot : slot + 1], expert, shift)
            product = row.float() * weight
            for rank, total in enumerate(totals):
                total += torch.where((expert >= 0) & (expert // local == rank), product, 0.0)
        one = torch.ones(len(self.x), 1, device=self.x.device)
        return [(total.bfloat16(), one) for total in totals]

    def _answers(self, slot: Tensor | int, expert: Tensor, shift: int) -> tuple[Tensor, Tensor]:
        """Rows ``[T, H]`` of one expert of each token, ``[T, 1]``, and their weights; where it is -1, both are 0."""
        there = expert >= 0
        mine = self._places[self._rank * self._sizes.tokens :][: self._sizes.tokens]
        place = mine.gather(1, expert.clamp_min(0))
        weight = self.topk_weights[:, slot : slot + 1] if isinstance(slot, int) else self.topk_weights.gather(1, slot)
        rows = self._pool.rows(expert, place, shift)[:, 0]
        return torch.where(there, rows, 0.0), torch.where(there, weight, 0.0)


def encoded_row(rows: Tensor, encoding: str) -> Encoding:
    """Encode and decode bfloat16 rows ``[n, H]``."""
    if encoding == "fp8":
        data, scale = fp8_cast(rows)
        return Encoding(data.float() * scale.repeat_interleave(GROUP, 1), torch.zeros((), device=rows.device))
    return _logfmt10(rows) if encoding == "logfmt10" else Encoding(rows.float(), torch.zeros((), device=rows.device))


def fp8_cast(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``[n, H]`` float8_e4m3fn and ``[n, H / 128]`` float32: the scale is ``max(amax, 1e-4) / 448``."""
    groups = rows.float().view(len(rows), -1, GROUP)
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(1e-4)
    # Tensors on both sides: torch divides by a number on GPUs by multiplying with its inverse.
    scale = amax / torch.full_like(amax, _FP8_MAX)
    data = (groups * (amax.reciprocal() * _FP8_MAX)).clamp(-_FP8_MAX, _FP8_MAX)
    return data.flatten(1).to(torch.float8_e4m3fn), scale[..., 0]


def _logfmt10(rows: Tensor) -> Encoding:
    """510 equal steps of the logarithm between each group's least and largest magnitude; the nearest value."""
    groups = rows.double().view(len(rows), -1, GROUP)
    size = groups.abs()
    hi = size.amax(-1, keepdim=True).log2().clamp(max=127.9999).float()
    least = size.masked_fill(size == 0, torch.inf).amin(-1, keepdim=True)
    lo = torch.minimum(torch.maximum(least.log2(), hi.double() - _LOG_RANGE).float(), hi)
    step = (hi - lo) / torch.full_like(hi, _LOG_STEPS)
    low, width = lo.double(), step.double()
    below = ((size.log2() - low) / width).floor().nan_to_num(nan=0.0).clamp(0, _LOG_STEPS - 1)
    near, far = torch.exp2(low + width * below), torch.exp2(low + width * (below + 1))
    value = torch.where(far - size <= size - near, far, near)
    value = torch.where(size < near, torch.where(size < near / 2, 0.0, near), value)  # below the range
    value = torch.where(size == 0, 0.0, value).nan_to_num(nan=0.0)
    slack = (value * (torch.exp2(width) - 1)).nan_to_num(nan=0.0)
    return Encoding((value * groups.sign()).flatten(1).float(), slack.flatten(1).float())
