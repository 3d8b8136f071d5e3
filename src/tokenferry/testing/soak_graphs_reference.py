"""The expected results of a decode iteration, computed on their device: torch on whole tensors, no loop over tokens.

Letters: S = R * M rows of all ranks together, by rank, then token; the rest as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.testing.reference import beyond_a_code, encode_and_decode, fp8_cast, fp8_values, power_of_two, unpacked
from tokenferry.types import DecodeDispatched, Quantized, Scale


@dataclass(frozen=True, slots=True, eq=False)
class AllInputs:
    """The inputs of all ranks: ``x`` ``[R, M, H]`` bfloat16, ``topk_idx`` and ``topk_weights`` ``[R, M, K]``."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor


def factors(num_experts: int, device: torch.device) -> Tensor:
    """Return ``[E]`` float32: the factor of each expert; neighbours differ, and products are exact."""
    numbers = torch.arange(num_experts, device=device, dtype=torch.int64)
    return power_of_two(numbers % 7 - 3) * (1 - 2 * (numbers // 7 % 2))


def _bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


class Reference:
    """The expected results of one rank.

    Args:
        inputs: Inputs of all ranks; E is a multiple of R.
        num_experts: E.
        rank: The rank whose results are expected.
        quantize: The cast of the dispatch; None: none.
        fast: Numerics of the combine.
        encoding: Encoding of the combine.
    """

    def __init__(
        self, inputs: AllInputs, num_experts: int, rank: int, quantize: Scale | None, *, fast: bool, encoding: str
    ) -> None:
        self._inputs, self._rank, self._quantize = inputs, rank, quantize
        self._fast, self._encoding = fast, encoding
        self._num_experts = num_experts
        self._num_local = num_experts // inputs.x.shape[0]
        # Of a sum over logfmt10; see `beyond_a_code`.
        self._magnitude = self._one_code = torch.zeros((), dtype=torch.float32, device="cpu")

    def wrong(
        self, sent: DecodeDispatched[Tensor | Quantized], total: Tensor, nodes: Sequence[Sequence[int]] = ()
    ) -> dict[str, Tensor]:
        """Return where results differ, by name: bool tensors. Does not wait for the device.

        Args:
            sent: The result of the dispatch.
            total: That of the combine.
            nodes: The ranks of each node, if there are several whose sums are rounded on the way.
        """
        found = self._wrong_rows(sent)
        want = self.total(nodes)
        found["sum"] = (
            beyond_a_code(total, want, self._magnitude, self._one_code)
            if self._encoding == "logfmt10"
            else _bits(total) != _bits(want)
        )
        return found

    # ------------------------------------------------------------------ dispatch

    def _wrong_rows(self, sent: DecodeDispatched[Tensor | Quantized]) -> dict[str, Tensor]:
        R, M, H = self._inputs.x.shape
        device, L = self._inputs.x.device, self._num_local
        local = torch.arange(L, device=device, dtype=torch.int64)
        chosen = self._inputs.topk_idx.reshape(R * M, -1, 1) == local + self._rank * L  # [S, K, L]
        received = chosen.any(1)
        place = (received.cumsum(0) - 1).clamp(min=0)  # [S, L]: by source rank, then token
        counts = received.view(R, M, L).sum(1)
        ranges = (counts.cumsum(0) - counts << 32 | counts).t()
        empty = (counts == 0).t()
        tokens = torch.arange(M, device=device, dtype=torch.int64).repeat(R)[:, None]
        # Weights are such that sums are exact in any order.
        weights = (chosen * self._inputs.topk_weights.reshape(R * M, -1, 1)).sum(1)
        plan = sent.plan
        assert plan.row_weights is not None
        wrong = {
            "expert_counts": sent.expert_counts != counts.sum(0),
            "src_range": ((plan.src_range != ranges) & ~empty) | ((plan.src_range & 0xFFFFFFFF != 0) & empty),
            "src_token": (plan.src_token[local, place] != tokens) & received,
            "row_weights": (plan.row_weights[local, place] != weights) & received,
        }
        x = self._inputs.x.view(R * M, 1, H)
        if self._quantize is None:
            assert isinstance(sent.x, Tensor)
            return {**wrong, "rows": (_bits(sent.x[local, place]) != _bits(x)) & received[..., None]}
        assert isinstance(sent.x, Quantized)
        data, scale = fp8_cast(x, self._quantize)
        scales = unpacked(sent.x.scale[local, place], scale.shape[-1])
        wrong["rows"] = (_bits(sent.x.data)[local, place] != _bits(data)) & received[..., None]
        wrong["scales"] = (scales != scale) & received[..., None]
        return wrong

    # ------------------------------------------------------------------ combine

    def total(self, nodes: Sequence[Sequence[int]] = ()) -> Tensor:
        """Return ``[M, H]`` bfloat16: the result of combine."""
        x, chosen = self._inputs.x[self._rank], self._inputs.topk_idx[self._rank].long()
        weights, used = self._inputs.topk_weights[self._rank], chosen >= 0
        rows = x.float() if self._quantize is None else fp8_values(*fp8_cast(x, self._quantize))
        factor = factors(self._num_experts, x.device)[chosen.clamp(min=0)]
        rows = (rows[:, None, :] * factor[..., None]).to(torch.bfloat16)  # [M, K, H]
        factor, owner = torch.where(used, weights, 0.0)[..., None], torch.where(used, chosen // self._num_local, -1)
        if self._fast:
            rows = self._sums_of_ranks(rows, chosen, weights)
            factor = torch.ones_like(rows[..., :1], dtype=torch.float32)
            owner = torch.arange(rows.shape[1], device=x.device, dtype=torch.int64).expand(rows.shape[:2])
        if len(nodes) > 1:
            by_rank = sorted((rank, node) for node, ranks in enumerate(nodes) for rank in ranks)
            numbers = [*(node for _, node in by_rank), -1]  # -1 stays -1
            node_of = torch.tensor(numbers, device=x.device, dtype=torch.int64)
            rows = _sums_by(rows.float() * factor, node_of[owner], len(nodes)).to(torch.bfloat16)
            factor, owner = torch.ones_like(rows[..., :1], dtype=torch.float32), torch.zeros_like(owner[:, :1])
        terms = torch.where(owner[..., None] >= 0, self._travelled(rows, factor) * factor, 0.0)
        return _in_order(terms).to(torch.bfloat16)

    def _sums_of_ranks(self, answers: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Add each rank's experts in their order, each once, with the weights of all its slots: ``[M, R, H]``."""
        same = chosen[:, :, None] == chosen[:, None, :]  # [M, K, K]
        weights = (same * weights[:, None, :]).sum(-1)
        first = ~same.tril(-1).any(-1) & (chosen >= 0)
        order = chosen.argsort(1)
        first, chosen, weights = (one.gather(1, order) for one in (first, chosen, weights))
        answers = answers.gather(1, order[..., None].expand_as(answers))
        owner = torch.where(first, chosen // self._num_local, -1)
        return _sums_by(answers.float() * weights[..., None], owner, self._inputs.x.shape[0]).to(torch.bfloat16)

    def _travelled(self, rows: Tensor, factor: Tensor) -> Tensor:
        """Return rows ``[M, n, H]`` float32 as they arrive, where they are multiplied with ``factor`` ``[M, n, 1]``."""
        arrived = encode_and_decode(rows, self._encoding)
        if self._encoding == "logfmt10":
            self._magnitude = (arrived.values * factor).abs().sum(1)
            self._one_code = (arrived.one_code * factor).abs().sum(1)
        return arrived.values


def _sums_by(terms: Tensor, owner: Tensor, num: int) -> Tensor:
    """Add ``[M, n, H]`` up to ``[M, num, H]`` by owner ``[M, n]``, -1: none, one after the other, from zero."""
    owners = torch.arange(num, device=terms.device, dtype=torch.int64)
    belongs = owner[..., None] == owners  # [M, n, num]
    total = torch.zeros_like(terms[:, :1]).repeat(1, num, 1)
    for i in range(terms.shape[1]):
        total = total + torch.where(belongs[:, i, :, None], terms[:, i, None], 0.0)
    return total


def _in_order(terms: Tensor) -> Tensor:
    """Add ``[M, n, H]`` up to ``[M, H]``, one after the other, from zero."""
    total = torch.zeros_like(terms[:, 0])
    for i in range(terms.shape[1]):
        total = total + terms[:, i]
    return total
