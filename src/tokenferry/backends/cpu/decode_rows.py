"""The rows that a decode combine sends: which, summed or not, encoded or not; and how their receivers read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenferry.backends.base import DecodeCombineRequest, Encoding
from tokenferry.backends.cpu import routing
from tokenferry.backends.cpu.allocator import Allocator
from tokenferry.backends.cpu.payload import Outgoing, Payload, ReceivedRows
from tokenferry.backends.cpu.route import consecutive_slices
from tokenferry.formats import fp8, logfmt
from tokenferry.types import DecodePlan, Quantized, Scale

_COUNT_BITS = 32
"""Each entry of ``DecodePlan.src_range`` is a start, shifted by this, and a count."""


def packed_ranges(counts: Tensor) -> Tensor:
    """Return ``DecodePlan.src_range`` for ``[L, R]`` counts."""
    return (counts.cumsum(1) - counts) << _COUNT_BITS | counts


def rows_for(
    request: DecodeCombineRequest, sources: Sequence[Sequence[int]], encoding: Encoding, allocator: Allocator
) -> Outgoing:
    """Select the rows for each rank, sum them per token if ``fast``, and encode them.

    Args:
        request: The combine.
        sources: By destination rank, the ranks whose tokens' rows it gets.
        encoding: The format of the rows.
        allocator: Provides memory.
    """
    flat, plan = request.y.view(-1, request.y.shape[-1]), request.plan
    if encoding is Encoding.same and not request.fast:
        positions = [_positions_from(plan, of_rank) for of_rank in sources]
        return Outgoing(Payload(flat), positions, [each.numel() for each in positions])
    parts = [_part(flat, request, of_rank, allocator) for of_rank in sources]
    counts = [part.shape[0] for part in parts]
    return Outgoing(encoded(torch.cat(parts), encoding), consecutive_slices(counts), counts)


def encoded(rows: Tensor, encoding: Encoding) -> Payload:
    """Return rows in the format in which they travel.

    A rank's own rows are encoded too, so that the sum does not depend on which rank an expert lives on.
    """
    if encoding is Encoding.same:
        return Payload(rows)
    done = fp8.cast(rows, Scale.FLOAT32) if encoding is Encoding.fp8 else logfmt.encode(rows)
    return Payload(done.data, scale=done.scale)


class TokenSums:
    """The sums of some tokens' rows, which come from all ranks that hold experts of theirs.

    Args:
        topk_idx: ``[T, K]``: the experts whose rows come; -1: none.
        weights: ``[T, K]`` float32; not read if ``fast``.
        num_experts: E.
        num_ranks: R.
        fast: Whether each rank sends one sum a token.

    Attributes:
        expected: By rank, how many rows it sends.
    """

    def __init__(self, topk_idx: Tensor, weights: Tensor, num_experts: int, num_ranks: int, *, fast: bool) -> None:
        self._weights, self._fast = weights, fast
        if fast:
            tokens, counts = routing.destinations(topk_idx, num_experts, num_ranks)
            self.expected: list[int] = counts.tolist()
            self._tokens = torch.split(tokens, self.expected)
        else:
            assigned = routing.assign(topk_idx, num_experts, 1, None)
            self.expected = assigned.counts.view(num_ranks, -1).sum(1).tolist()
            self._row_idx = assigned.row_idx

    def write(
        self, out: Tensor, rows: Payload, received: Sequence[ReceivedRows], encoding: Encoding, allocator: Allocator
    ) -> None:
        """Add up the rows that were received from each rank, and write the sums to ``out`` ``[T, H]``."""
        if self._fast:
            by_rank = decoded_by_source(rows, received, encoding, allocator)
            routing.reduce_rows(out, self._tokens, by_rank, allocator)
        else:
            all_rows = _decoded(rows, received, encoding, allocator)
            routing.reduce_weighted(out, all_rows, self._row_idx, self._weights, allocator)


def decoded_by_source(
    payload: Payload, received: Sequence[ReceivedRows], encoding: Encoding, allocator: Allocator
) -> Sequence[Tensor]:
    """Return the decoded rows of each source, without a copy if they were not encoded."""
    if encoding is Encoding.same:
        return [payload.view_rows(source) for source in received]
    return torch.split(_decoded(payload, received, encoding, allocator), [each.num_rows for each in received])


def _decoded(payload: Payload, received: Sequence[ReceivedRows], encoding: Encoding, allocator: Allocator) -> Tensor:
    """Return the rows of all sources: as they were sent, or, if they were encoded, in float32."""
    rows = payload.gather_rows(received, allocator)
    if encoding is Encoding.same:
        return rows
    both = Quantized(rows, payload.gather_metadata(received)["scale"])
    return fp8.dequantize(both) if encoding is Encoding.fp8 else logfmt.decode(both)


def _part(flat: Tensor, request: DecodeCombineRequest, sources: Sequence[int], allocator: Allocator) -> Tensor:
    """Return the rows for the tokens of some ranks: by expert, or, summed per token, by rank."""
    plan = request.plan
    if not request.fast:
        return flat[_positions_from(plan, sources)]
    sums = [_sum_per_token(flat, plan, _positions_from(plan, [src]), allocator) for src in sources]
    return torch.cat([flat[:0], *sums])


def _positions_from(plan: DecodePlan, sources: Sequence[int]) -> Tensor:
    """Return the positions (expert * capacity + row) of the rows from some ranks, by expert, then rank, then token."""
    capacity = plan.src_token.shape[1]
    ranges = plan.src_range[:, list(sources)]
    counts = (ranges & ((1 << _COUNT_BITS) - 1)).flatten()
    first_of_expert = torch.arange(ranges.shape[0], dtype=torch.int64, device="cpu")[:, None] * capacity
    firsts = ((ranges >> _COUNT_BITS) + first_of_expert).flatten()
    before = counts.cumsum(0) - counts
    within = torch.arange(int(counts.sum()), dtype=torch.int64, device="cpu")
    return torch.repeat_interleave(firsts - before, counts) + within


def _sum_per_token(flat: Tensor, plan: DecodePlan, positions: Tensor, allocator: Allocator) -> Tensor:
    """Return weighted sums of the rows at ``positions``, one per distinct token, by token.

    The experts of a token are added in order, and the sum is rounded once.
    """
    assert plan.row_weights is not None
    tokens, which, counts = torch.unique(plan.src_token.flatten()[positions], return_inverse=True, return_counts=True)
    # Build the table of each token's positions: sorted by token and, because the sort is stable, by expert within one.
    order = which.argsort(stable=True)
    which = which[order]
    column = torch.arange(which.numel(), dtype=torch.int64, device="cpu") - (counts.cumsum(0) - counts)[which]
    most = int(counts.max()) if counts.numel() else 0
    row_idx = torch.full((tokens.numel(), most), -1, dtype=torch.int64, device="cpu")
    row_idx[which, column] = positions[order]
    weights = torch.zeros(row_idx.shape, dtype=torch.float32, device="cpu")
    weights[which, column] = plan.row_weights.flatten()[positions[order]]
    sums = flat.new_empty(tokens.numel(), flat.shape[1])
    routing.reduce_weighted(sums, flat, row_idx, weights, allocator)
    return sums
