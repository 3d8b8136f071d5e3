"""Pure functions of the CPU backend: compute where rows go, move them and sum them. No transport, no state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.backends.base import TokenLayout
from tokenferry.backends.cpu.allocator import Allocator

_BLOCK_BYTES = 1 << 21
"""Size of the float32 sums computed at once where each row is added once: small enough for the last-level cache, and
large enough to amortize the calls into torch."""
_WEIGHTED_BLOCK_BYTES = 1 << 19
"""The same where K rows are added to each sum: they fit into the private cache of one core."""


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """The position of every row among the rows of the local experts.

    Attributes:
        counts: ``[L]`` int64 rows of each expert.
        starts: ``[L + 1]`` int64 first position of each expert, and the end.
        row_idx: ``[N, K]`` int64 position of each slot's row, or -1; slots that repeat an expert share one position.
    """

    counts: Tensor
    starts: Tensor
    row_idx: Tensor


def destinations(topk_idx: Tensor, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Return the token of each row to send, by destination rank, then token, and the rows per rank ``[R]`` int64."""
    hit = hits(topk_idx.long(), num_experts // num_ranks, num_ranks)
    return hit.T.nonzero()[:, 1].contiguous(), hit.sum(0)


def token_layout(topk_idx: Tensor, num_experts: int, num_ranks: int) -> TokenLayout:
    """Return how many tokens go to each rank and to each expert, and which go where."""
    index = torch.where(topk_idx < num_experts, topk_idx, -1).long()
    in_rank, chosen = hits(index, num_experts // num_ranks, num_ranks), hits(index, 1, num_experts)
    per_rank, per_expert = in_rank.sum(0, dtype=torch.int32), chosen.sum(0, dtype=torch.int32)
    return TokenLayout(per_rank, None, per_expert, in_rank.contiguous())


def restricted(topk_idx: Tensor, in_rank: Tensor, num_experts: int) -> Tensor:
    """Return a routing with -1 in the slots of ranks that ``in_rank`` leaves out; ids outside [0, E) stay."""
    num_ranks = in_rank.shape[1]
    owner = (topk_idx // (num_experts // num_ranks)).clamp(0, num_ranks - 1).long()
    used = (topk_idx >= 0) & (topk_idx < num_experts)
    return topk_idx.masked_fill(used & ~in_rank.gather(1, owner), -1)


def to_local(topk_idx: Tensor, first: int, num_local: int) -> Tensor:
    """Return local expert ids: ``first`` becomes 0, and experts of other ranks become -1."""
    here = (topk_idx >= first) & (topk_idx < first + num_local)
    return torch.where(here, topk_idx - first, -1)


def assign(local_idx: Tensor, num_local: int, alignment: int, capacity: int | None) -> Assignment:
    """Assign each row one position per local expert that it goes to.

    The positions of an expert are contiguous and start at a multiple of ``alignment``, or of ``capacity`` if given.
    """
    hit = hits(local_idx.long(), 1, num_local)
    counts = hit.sum(0)
    if capacity is None:
        starts = expert_starts(counts, alignment)
    else:
        starts = torch.arange(num_local + 1, dtype=torch.int64, device="cpu") * capacity
    experts, rows = hit.T.nonzero().unbind(1)
    first_pair = counts.cumsum(0) - counts
    positions = torch.arange(rows.numel(), dtype=torch.int64, device="cpu") + (starts[:-1] - first_pair)[experts]
    table = torch.full((local_idx.shape[0], num_local + 1), -1, dtype=torch.int64, device="cpu")
    table[rows, experts] = positions
    row_idx = table.gather(1, torch.where(local_idx >= 0, local_idx, num_local).long())
    return Assignment(counts, starts, row_idx)


def expert_starts(counts: Tensor, alignment: int) -> Tensor:
    """Return ``[L + 1]`` int64: the first position of each expert, a multiple of ``alignment``, and the end."""
    padded = (counts.long() + alignment - 1) // alignment * alignment
    return torch.cat([padded.new_zeros(1), padded.cumsum(0)])


def expand_rows(rows: Tensor, row_idx: Tensor, ranges: Sequence[range], out: Tensor) -> None:
    """Copy each of ``rows`` ``[N, width]`` to all its positions in ``out`` ``[P, width]``.

    Args:
        rows: The received rows.
        row_idx: ``[N, K]`` as in `Assignment`.
        ranges: Per expert, the positions of its rows.
        out: Written in ``ranges`` only.
    """
    if not rows.shape[1]:
        return
    source = torch.empty(out.shape[0], dtype=torch.int64, device="cpu")
    row, slot = (row_idx >= 0).nonzero().unbind(1)
    source[row_idx[row, slot]] = row
    words, out = as_words(rows, out)
    for here in _joined(ranges):
        torch.index_select(words, 0, source[here], out=out[here])


def zero_padding(ranges: Sequence[range], out: Tensor) -> None:
    """Set ``out`` to zero outside of the experts' ``ranges``."""
    (out,), end = as_words(out), 0
    for here in _joined(ranges):
        out[end : here.start] = 0
        end = here.stop
    out[end:] = 0


def _joined(ranges: Sequence[range]) -> list[slice]:
    """Return ascending ranges as few slices: without alignment one."""
    found: list[slice] = []
    for each in ranges:
        if found and found[-1].stop == each.start:
            found[-1] = slice(found[-1].start, each.stop)
        elif each:
            found.append(slice(each.start, each.stop))
    return found


def pad(rows: Tensor, num_rows: int, fill: int | None = None) -> Tensor:
    """Return ``rows`` extended to ``num_rows`` with ``fill``, or with undefined rows."""
    if rows.shape[0] == num_rows:
        return rows
    out = torch.empty(num_rows, *rows.shape[1:], dtype=rows.dtype, device="cpu")
    out[: rows.shape[0]] = rows
    if fill is not None:
        out[rows.shape[0] :] = fill
    return out


def scatter_weights(topk_weights: Tensor, row_idx: Tensor, num_positions: int) -> Tensor:
    """Return ``[num_positions]`` float32: per delivered row, the sum of the weights of its slots, in slot order."""
    used = row_idx >= 0
    weights = torch.zeros(num_positions, dtype=torch.float32, device="cpu")
    return weights.index_add_(0, row_idx[used], topk_weights[used])


def gather_weights(row_weights: Tensor, row_idx: Tensor) -> Tensor:
    """Return ``[N, K]`` float32, the transpose of `scatter_weights`: per slot the weight of its row, 0 without one."""
    used = row_idx >= 0
    weights = torch.zeros(row_idx.shape, dtype=torch.float32, device="cpu")
    weights[used] = row_weights.flatten()[row_idx[used]]
    return weights


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which rows of ``dtype`` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reduce_rows(
    out: Tensor, tokens: Sequence[Tensor], rows: Sequence[Tensor], allocator: Allocator, biases: Sequence[Tensor] = ()
) -> None:
    """Write to ``out`` ``[T, H]`` the biases plus each token's rows, in source order, rounded once.

    The sums are computed in blocks of tokens, in scratch memory that stays in cache: touching new memory costs more
    than the additions.

    Args:
        out: Receives the sums.
        tokens: Per source, the tokens of its rows, ascending.
        rows: Per source, ``[rows, H]``.
        allocator: Provides scratch memory.
        biases: ``[T, H]`` each; added first.
    """
    num_tokens, width = out.shape
    block = max(1, _BLOCK_BYTES // (4 * width))
    size, dtype = min(block, num_tokens), accumulator_dtype(out.dtype)
    total, addend = (allocator.empty(size, width, dtype=dtype) for _ in range(2))
    starts = torch.arange(0, num_tokens + block, block, dtype=torch.int64, device="cpu")
    cuts = [torch.searchsorted(each, starts).tolist() for each in tokens]
    for i, first in enumerate(range(0, num_tokens, block)):
        part = total[: min(block, num_tokens - first)].zero_()
        for bias in biases:
            part += bias[first : first + block]
        for each, source, cut in zip(tokens, rows, cuts, strict=True):
            begin, end = cut[i], cut[i + 1]
            part.index_add_(0, each[begin:end] - first, addend[: end - begin].copy_(source[begin:end]))
        out[first : first + block] = part


def reduce_weighted(out: Tensor, rows: Tensor, row_idx: Tensor, weights: Tensor, allocator: Allocator) -> None:
    """Write to ``out`` ``[T, H]`` ``sum_k weights[:, k] * rows[row_idx[:, k]]`` in float32, in slot order, without -1.

    Products are rounded before they are added, so that the result does not depend on fused multiply-adds. Computed in
    blocks, like `reduce_rows`.
    """
    num_tokens, width = out.shape
    block = max(1, _WEIGHTED_BLOCK_BYTES // (4 * width))
    size = min(block, num_tokens)
    total, product = (allocator.empty(size, width, dtype=torch.float32) for _ in range(2))
    picked = allocator.empty(size, width, dtype=rows.dtype)
    for first in range(0, num_tokens, block):
        part = total[: min(block, num_tokens - first)].zero_()
        here = slice(first, first + block)
        for positions, weight in zip(row_idx[here].unbind(1), weights[here].unbind(1), strict=True):
            used = (positions >= 0).nonzero()[:, 0]
            num = used.numel()
            torch.index_select(rows, 0, positions[used], out=picked[:num])
            part.index_add_(0, used, product[:num].copy_(picked[:num]).mul_(weight[used, None]))
        out[here] = part


def reduce_expert_rows(y: Tensor, row_idx: Tensor) -> Tensor:
    """Return ``[N, H]`` in the accumulator dtype: the sum of each received row's delivered rows, in order of position.

    A position that several slots share is added once.
    """
    total = torch.zeros(row_idx.shape[0], y.shape[1], dtype=accumulator_dtype(y.dtype), device="cpu")
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
    # Flat first: the strides of empty tensors, and of single rows and columns, need not be those that view() requires.
    flat = rows.as_strided((rows.numel(),), (1,))
    return flat.view(torch.uint8).view(rows.shape[0], rows.shape[1] * rows.element_size())


def as_words(*rows: Tensor) -> list[Tensor]:
    """View ``[n, width]`` contiguous rows as integers, so that copying them is cheap.

    All have the same bytes in a row, and become the widest integers that divide these and the places where they begin.
    """
    views = [as_bytes(each) for each in rows]
    width = views[0].shape[1]
    for dtype, size in ((torch.int64, 8), (torch.int32, 4), (torch.int16, 2)):
        if width and width % size == 0 and all(view.storage_offset() % size == 0 for view in views):
            none = torch.empty(0, width // size, dtype=dtype, device="cpu")
            return [view.view(dtype) if len(view) else none for view in views]
    return views


def hits(topk_idx: Tensor, width: int, num: int) -> Tensor:
    """Return ``[T, num]`` bool: whether any index of row t lies in ``[i * width, (i + 1) * width)``."""
    hit = torch.zeros(topk_idx.shape[0], num + 1, dtype=torch.bool, device="cpu")
    hit.scatter_(1, torch.where(topk_idx >= 0, topk_idx // width, num), True)
    return hit[:, :num]
