"""What a decode round must give, computed where its results are: plain torch on whole tensors, no loop over tokens.

Letters: S = R * M rows of all ranks together, by rank, then token; the rest as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.types import DecodeDispatched, Quantized, Scale

GROUP = 128
"""Columns that share a scale."""
LOG_STEPS = 510
"""Of logfmt10: from its least number other than 0 to the largest."""
_MOST = 448.0
_LEAST = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class Brought:
    """What all ranks bring: ``x`` ``[R, M, H]`` bfloat16, ``topk_idx`` and ``topk_weights`` ``[R, M, K]``."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor


def factors(num_experts: int, device: torch.device) -> Tensor:
    """``[E]`` float32: what each expert multiplies its rows with; neighbours differ, and products are exact."""
    numbers = torch.arange(num_experts, device=device)
    return _power_of_two(numbers % 7 - 3) * (1 - 2 * (numbers // 7 % 2))


def cast(x: Tensor, kind: Scale) -> tuple[Tensor, Tensor]:
    """``[..., H]`` to float8_e4m3fn, and ``[..., H / 128]`` float32 scales."""
    groups = _grouped(x.float())
    amax = groups.abs().amax(-1, keepdim=True).clamp(min=_LEAST)
    scale = amax / torch.full_like(amax, _MOST)  # a number would be multiplied with, as its inverse
    if kind is Scale.FLOAT32:
        scaled = groups * (_MOST / amax)
    else:
        mantissa, exponent = torch.frexp(scale)
        scale = _power_of_two(exponent - (mantissa == 0.5).int())
        scaled = groups / scale
    return scaled.clamp(-_MOST, _MOST).to(torch.float8_e4m3fn).flatten(-2), scale.squeeze(-1)


def numbers(data: Tensor, scale: Tensor) -> Tensor:
    """``[..., H]`` float32 of a cast with float32 scales."""
    return (_grouped(data.float()) * scale[..., None]).flatten(-2)


def logarithmic(rows: Tensor) -> tuple[Tensor, Tensor]:
    """What ``[..., H]`` finite numbers are after they travelled as logfmt10, and how far off a neighbouring code is."""
    groups = _grouped(rows.double())
    sizes = groups.abs()
    hi = sizes.amax(-1, keepdim=True).log2().clamp(max=127.9999).float()
    least = sizes.masked_fill(sizes == 0, torch.inf).amin(-1, keepdim=True).log2()
    lo = torch.minimum(torch.maximum(least, hi.double() - 32).float(), hi)
    step = (hi - lo) / torch.full_like(hi, LOG_STEPS)  # as in `cast`

    def value(number: Tensor) -> Tensor:
        return torch.exp2(lo.double() + step.double() * number)

    below = ((sizes.log2() - lo) / step).floor().nan_to_num(nan=0.0).clamp(0, LOG_STEPS - 1)
    # Logarithms differ in their last bits: the nearest is looked for on both sides.
    near = torch.stack([value((below + i).clamp(0, LOG_STEPS)) for i in (-1, 0, 1, 2)])
    nearest = near.gather(0, (near - sizes).abs().argmin(0, keepdim=True)).squeeze(0)
    nearest = torch.where(2 * sizes < value(torch.zeros_like(below)), 0.0, nearest)
    gap = nearest * (torch.exp2(step.double()) - 1)
    only_zeros = sizes.amax(-1, keepdim=True) == 0
    nearest, gap = (torch.where(only_zeros, 0.0, one) for one in (nearest, gap))
    return torch.copysign(nearest, groups).float().flatten(-2), gap.float().flatten(-2)


def _grouped(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)


def loaded(scale: Tensor, num_groups: int) -> Tensor:
    """Scales ``[..., S]`` as float32, from however a result stores them."""
    if scale.dtype == torch.float32:
        return scale
    shifts = torch.arange(0, 32, 8, device=scale.device)
    exponents = (scale[..., None] >> shifts & 255).flatten(-2)[..., :num_groups]
    return _power_of_two(exponents - 127)


def _power_of_two(exponent: Tensor) -> Tensor:
    return (exponent.int() + 127 << 23).view(torch.float32)


def _bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


class Truth:
    """What one rank's results must be.

    Args:
        brought: By all ranks; E is a multiple of R.
        num_experts: E.
        rank: Whose results.
        fp8: The cast of the dispatch.
        numerics: ``(fast, encoding)`` of the combine.
    """

    def __init__(
        self, brought: Brought, num_experts: int, rank: int, fp8: Scale | None, numerics: tuple[bool, str]
    ) -> None:
        self._brought, self._rank, self._fp8 = brought, rank, fp8
        self._fast, self._encoding = numerics
        self._num_experts = num_experts
        self._num_local = num_experts // brought.x.shape[0]
        self._sizes = (torch.zeros(()), torch.zeros(()))  # of a sum over logfmt10: magnitudes, steps of one code

    def wrong(self, sent: DecodeDispatched[Tensor | Quantized], total: Tensor) -> dict[str, Tensor]:
        """Where results differ, by what they are: bool tensors; nothing waits for the device."""
        found = self._wrong_rows(sent)
        want = self.total()
        found["sum"] = self._too_far(total, want) if self._encoding == "logfmt10" else _bits(total) != _bits(want)
        return found

    def _too_far(self, total: Tensor, want: Tensor) -> Tensor:
        """Where sums over logfmt10 are wrong: a number half-way between two codes takes either, but few are."""
        magnitude, one_code = self._sizes
        far = (total.float() - want.float()).abs()
        fine = magnitude * 2.0**-16 + want.float().abs() * torch.finfo(total.dtype).eps
        other_code = ~(far <= fine)
        few = other_code.sum() <= max(2, other_code.numel() // 100)
        return other_code & ~((far <= fine + 1.01 * one_code) & few)

    # ------------------------------------------------------------------ dispatch

    def _wrong_rows(self, sent: DecodeDispatched[Tensor | Quantized]) -> dict[str, Tensor]:
        R, M, H = self._brought.x.shape
        device, L = self._brought.x.device, self._num_local
        local = torch.arange(L, device=device)
        named = self._brought.topk_idx.reshape(R * M, -1, 1) == local + self._rank * L  # [S, K, L]
        here = named.any(1)
        place = (here.cumsum(0) - 1).clamp(min=0)  # [S, L]: by source rank, then token
        counts = here.view(R, M, L).sum(1)
        ranges = (counts.cumsum(0) - counts << 32 | counts).t()
        empty = (counts == 0).t()
        tokens = torch.arange(M, device=device).repeat(R)[:, None]
        # Weights are such that sums are exact in any order.
        weights = (named * self._brought.topk_weights.reshape(R * M, -1, 1)).sum(1)
        plan = sent.plan
        assert plan.row_weights is not None
        wrong = {
            "expert_counts": sent.expert_counts != counts.sum(0),
            "src_range": ((plan.src_range != ranges) & ~empty) | ((plan.src_range & 0xFFFFFFFF != 0) & empty),
            "src_token": (plan.src_token[local, place] != tokens) & here,
            "row_weights": (plan.row_weights[local, place] != weights) & here,
        }
        x = self._brought.x.view(R * M, 1, H)
        if self._fp8 is None:
            assert isinstance(sent.x, Tensor)
            return {**wrong, "rows": (_bits(sent.x[local, place]) != _bits(x)) & here[..., None]}
        assert isinstance(sent.x, Quantized)
        data, scale = cast(x, self._fp8)
        scales = loaded(sent.x.scale[local, place], scale.shape[-1])
        wrong["rows"] = (_bits(sent.x.data)[local, place] != _bits(data)) & here[..., None]
        wrong["scales"] = (scales != scale) & here[..., None]
        return wrong

    # ------------------------------------------------------------------ combine

    def total(self) -> Tensor:
        """``[M, H]`` bfloat16: what combine brings home."""
        x, chosen = self._brought.x[self._rank], self._brought.topk_idx[self._rank].long()
        weights, used = self._brought.topk_weights[self._rank], chosen >= 0
        rows = x.float() if self._fp8 is None else numbers(*cast(x, self._fp8))
        factor = factors(self._num_experts, x.device)[chosen.clamp(min=0)]
        answers = (rows[:, None, :] * factor[..., None]).to(torch.bfloat16)  # [M, K, H]
        if self._fast:
            return self._sum_of_ranks(answers, chosen, weights)
        factor = torch.where(used, weights, 0.0)[..., None]
        terms = torch.where(used[..., None], self._travelled(answers, factor) * factor, 0.0)
        return _in_order(terms).to(torch.bfloat16)

    def _sum_of_ranks(self, answers: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Each rank's experts in their order, each once, with the weights of all its slots; then rank by rank."""
        same = chosen[:, :, None] == chosen[:, None, :]  # [M, K, K]
        weights = (same * weights[:, None, :]).sum(-1)
        first = ~same.tril(-1).any(-1) & (chosen >= 0)
        order = chosen.argsort(1)
        first, chosen, weights = (one.gather(1, order) for one in (first, chosen, weights))
        answers = answers.gather(1, order[..., None].expand_as(answers))
        terms = answers.float() * weights[..., None]
        ranks = torch.arange(self._brought.x.shape[0], device=chosen.device)
        from_rank = (chosen[..., None] // self._num_local == ranks) & first[..., None]  # [M, K, R]
        partial = torch.zeros_like(terms[:, :1]).repeat(1, len(ranks), 1)
        for slot in range(terms.shape[1]):
            partial = partial + torch.where(from_rank[:, slot, :, None], terms[:, slot, None], 0.0)
        rows = partial.to(torch.bfloat16)
        return _in_order(self._travelled(rows, torch.ones_like(rows[..., :1], dtype=torch.float32))).to(torch.bfloat16)

    def _travelled(self, rows: Tensor, factor: Tensor) -> Tensor:
        """``[M, n, H]`` float32, as they come home, where they are multiplied with ``[M, n, 1]``."""
        if self._encoding == "logfmt10":
            values, gaps = logarithmic(rows)
            self._sizes = (values * factor).abs().sum(1), (gaps * factor).abs().sum(1)
            return values
        return numbers(*cast(rows, Scale.FLOAT32)) if self._encoding == "fp8" else rows.float()


def _in_order(terms: Tensor) -> Tensor:
    """``[M, n, H]`` to ``[M, H]``: added one after the other, from zero."""
    total = torch.zeros_like(terms[:, 0])
    for i in range(terms.shape[1]):
        total = total + terms[:, i]
    return total
