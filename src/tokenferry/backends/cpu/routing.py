"""Pure functions of the CPU backend: which row goes where, and how rows are added up. No transport, no state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.backends.cpu.allocator import Allocator

_BLOCK_BYTES = 1 << 21
"""Float32 sums that are under way at once where each row is added once: few enough for the last cache, and enough rows
to be worth a block's calls."""
_WEIGHTED_BLOCK_BYTES = 1 << 19
"""The same where K rows are added to each sum: few enough for a core's own cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """Where the rows of experts go.

    Attributes:
        counts: ``[L]`` int64 rows of each expert.
        starts: ``[L + 1]`` int64 first place of each expert, and the end.
        row_idx: ``[N, K]`` int64 place of each slot's row, or -1; a repeated expert repeats its place.
    """

    counts: Tensor
    starts: Tensor
    row_idx: Tensor


def destinations(topk_idx: Tensor, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Return the token of each row to send, by destination rank, then token, and the rows per rank ``[R]`` int64."""
    hit = hits(topk_idx.long(), num_experts // num_ranks, num_ranks)
    return hit.T.nonzero()[:, 1].contiguous(), hit.sum(0)


def to_local(topk_idx: Tensor, first: int, num_local: int) -> Tensor:
    """Return local expert ids: ``first`` becomes 0; experts that are elsewhere become -1."""
    here = (topk_idx >= first) & (topk_idx < first + num_local)
    return torch.where(here, topk_idx - first, -1)


def spread(local_idx: Tensor, num_local: int, alignment: int, capacity: int | None) -> Spread:
    """Place each row once per local expert, whose places start at multiples of ``alignment``, or of ``capacity``."""
    hit = hits(local_idx.long(), 1, num_local)
    counts = hit.sum(0)
    starts = expert_starts(counts, alignment) if capacity is None else torch.arange(num_local + 1) * capacity
    experts, rows = hit.T.nonzero().unbind(1)
    first_pair = counts.cumsum(0) - counts
    places = torch.arange(rows.numel()) + (starts[:-1] - first_pair)[experts]
    table = torch.full((local_idx.shape[0], num_local + 1), -1)
    table[rows, experts] = places
    row_idx = table.gather(1, torch.where(local_idx >= 0, local_idx, num_local).long())
    return Spread(counts, starts, row_idx)


def expert_starts(counts: Tensor, alignment: int) -> Tensor:
    """Return ``[L + 1]`` int64: the first place of each expert at multiples of ``alignment``, and the end."""
    padded = (counts.long() + alignment - 1) // alignment * alignment
    return torch.cat([padded.new_zeros(1), padded.cumsum(0)])


def place(rows: Tensor, row_idx: Tensor, places: Sequence[range], out: Tensor) -> None:
    """Write each of ``rows`` ``[N, width]`` to all its places in ``out`` ``[places, width]``.

    Args:
        rows: What was received.
        row_idx: ``[N, K]`` as in `Spread`.
        places: Per expert, the places of its rows.
        out: Places of no row are left as they are.
    """
    if not rows.shape[1]:
        return
    source = torch.empty(out.shape[0], dtype=torch.int64)
    row, slot = (row_idx >= 0).nonzero().unbind(1)
    source[row_idx[row, slot]] = row
    for of_expert in places:
        here = slice(of_expert.start, of_expert.stop)
        torch.index_select(words(rows), 0, source[here], out=words(out)[here])


def zero_rest(places: Sequence[range], out: Tensor) -> None:
    """Make ``out`` zero where no expert has a row."""
    end = 0
    for of_expert in places:
        words(out)[end : of_expert.start] = 0
        end = of_expert.stop
    words(out)[end:] = 0


def pad(rows: Tensor, num_rows: int, fill: int | None = None) -> Tensor:
    """Return ``rows`` made longer, by undefined rows or by ``fill``."""
    if rows.shape[0] == num_rows:
        return rows
    out = torch.empty(num_rows, *rows.shape[1:], dtype=rows.dtype)
    out[: rows.shape[0]] = rows
    if fill is not None:
        out[rows.shape[0] :] = fill
    return out


def add_weights(topk_weights: Tensor, row_idx: Tensor, num_places: int) -> Tensor:
    """Return ``[num_places]`` float32: the weights of all slots that share a delivered row, added in slot order."""
    used = row_idx >= 0
    return torch.zeros(num_places).index_add_(0, row_idx[used], topk_weights[used])


def spread_weights(row_weights: Tensor, row_idx: Tensor) -> Tensor:
    """The transpose of `add_weights`: ``[N, K]`` float32, each slot the weight of its row, 0 without one."""
    used = row_idx >= 0
    weights = torch.zeros(row_idx.shape)
    weights[used] = row_weights.flatten()[row_idx[used]]
    return weights


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows of ``dtype`` are added up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def add_up(
    out: Tensor, home: Sequence[Tensor], rows: Sequence[Tensor], allocator: Allocator, biases: Sequence[Tensor] = ()
) -> None:
    """Write to ``out`` ``[T, H]`` the biases plus, source by source, each token's row; one rounding.

    Works through blocks of tokens, in memory that was used before and stays in cache: touching new memory costs more
    than the additions.

    Args:
        out: Where the sums go.
        home: Per source, the tokens of its rows, ascending.
        rows: Per source, ``[rows, H]``.
        allocator: Where scratch memory comes from.
        biases: ``[T, H]`` each; added first.
    """
    num_tokens, width = out.shape
    block = max(1, _BLOCK_BYTES // (4 * width))
    total, addend = (allocator.empty(min(block, num_tokens), width, dtype=wide(out.dtype)) for _ in range(2))
    starts = torch.arange(0, num_tokens + block, block)
    cuts = [torch.searchsorted(tokens, starts).tolist() for tokens in home]
    for i, first in enumerate(range(0, num_tokens, block)):
        part = total[: min(block, num_tokens - first)].zero_()
        for bias in biases:
            part += bias[first : first + block]
        for tokens, source, cut in zip(home, rows, cuts, strict=True):
            begin, end = cut[i], cut[i + 1]
            part.index_add_(0, tokens[begin:end] - first, addend[: end - begin].copy_(source[begin:end]))
        out[first : first + block] = part


def add_up_weighted(out: Tensor, rows: Tensor, row_idx: Tensor, weights: Tensor, allocator: Allocator) -> None:
    """Write to ``out`` ``[T, H]`` ``sum_k weights[:, k] * rows[row_idx[:, k]]`` in float32, in slot order, without -1.

    Products are rounded before they are added, so that the bits do not depend on what fuses. In blocks, as `add_up`.
    """
    num_tokens, width = out.shape
    block = max(1, _WEIGHTED_BLOCK_BYTES // (4 * width))
    size = min(block, num_tokens)
    total, product = (allocator.empty(size, width, dtype=torch.float32) for _ in range(2))
    picked = allocator.empty(size, width, dtype=rows.dtype)
    for first in range(0, num_tokens, block):
        part = total[: min(block, num_tokens - first)].zero_()
        here = slice(first, first + block)
        for places, weight in zip(row_idx[here].unbind(1), weights[here].unbind(1), strict=True):
            used = (places >= 0).nonzero()[:, 0]
            num = used.numel()
            torch.index_select(rows, 0, places[used], out=picked[:num])
            part.index_add_(0, used, product[:num].copy_(picked[:num]).mul_(weight[used, None]))
        out[here] = part


def gather_sum(y: Tensor, row_idx: Tensor) -> Tensor:
    """Return ``[N, H]`` in the wide dtype: the sum of each received row's delivered rows, by place, each once."""
    total = torch.zeros(row_idx.shape[0], y.shape[1], dtype=wide(y.dtype))
    order = row_idx.sort(dim=1).values
    for slot in range(order.shape[1]):
        fresh = order[:, slot] >= 0
        if slot:
            fresh &= order[:, slot] != order[:, slot - 1]
        rows = fresh.nonzero()[:, 0]
        total.index_add_(0, rows, y[order[rows, slot]].to(total.dtype))
    return total


def as_bytes(rows: Tensor) -> Tensor:
    """View ``[n, width]`` contiguous rows as ``[n, bytes]`` uint8."""
    if rows.dtype == torch.uint8:
        return rows
    # Flat first: strides of empty tensors, and of single columns, need not be what view() asks for.
    return rows.reshape(-1).view(torch.uint8).view(rows.shape[0], rows.shape[1] * rows.element_size())


def words(rows: Tensor) -> Tensor:
    """View ``[n, width]`` contiguous rows in the widest integers that fit, so that copies of rows are cheap."""
    rows = as_bytes(rows)
    width = rows.shape[1]
    for dtype, size in ((torch.int64, 8), (torch.int32, 4), (torch.int16, 2)):
        if width % size == 0 and width:
            return rows.view(dtype) if len(rows) else torch.empty(0, width // size, dtype=dtype)
    return rows


def hits(topk_idx: Tensor, width: int, num: int) -> Tensor:
    """Return ``[T, num]`` bool: whether any index of a row lies in ``[i * width, (i + 1) * width)``."""
    hit = torch.zeros(topk_idx.shape[0], num + 1, dtype=torch.bool)
    hit.scatter_(1, torch.where(topk_idx >= 0, topk_idx // width, num), True)
    return hit[:, :num]
