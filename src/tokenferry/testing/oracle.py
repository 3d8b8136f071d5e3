"""The expected results of every call, by plain loops over all ranks' inputs; shares no code with what it judges.

The oracle has the inputs of every rank, so it needs no process group, and it imports nothing but torch. It follows the
docstrings of `tokenferry.ExpertGroup`; where those say "rounded", it rounds, and nowhere else: bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FP8_MAX = 448.0
"""The largest float8_e4m3fn."""

FP8_NAN = 0x7F
"""Its NaN without a sign."""

FP8_BLOCK = 128
"""Columns that share a scale."""

LOG_BLOCK = 128
"""Columns that share the range of a logarithmic format."""

LOG_CODES = 512
"""Magnitudes that it has, 0 included."""


@dataclass(frozen=True, eq=False)
class Sent:
    """The inputs of one rank: ``x`` ``[T, H]``, ``topk_idx`` ``[T, K]``, ``topk_weights`` ``[T, K]`` or None."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor | None = None


@dataclass(frozen=True)
class Row:
    """One delivered row: its place, its token, and (EXPERTS, MASKED) its local expert.

    ``place`` counts rows of the delivered tensor; in MASKED expert e begins at ``e * capacity``.
    """

    place: int
    src_rank: int
    src_token: int
    expert: int | None


class Oracle:
    """One dispatch with the inputs of all ranks.

    Args:
        sent: The inputs of each of the R ranks.
        num_experts: E, a multiple of R.
        layout: ``"rows"``, ``"experts"`` or ``"masked"``.
        alignment: A; experts only.
        capacity: Rows of one expert; masked only.
    """

    def __init__(
        self, sent: Sequence[Sent], num_experts: int, layout: str = "rows", *, alignment: int = 1, capacity: int = 0
    ) -> None:
        self.sent = sent
        self.layout = layout
        self.alignment = alignment
        self.capacity = capacity
        self.num_ranks = len(sent)
        self.num_local = num_experts // len(sent)
        self.choices = [one.topk_idx.tolist() for one in sent]
        # Looked up for every row of every check, so made once.
        ranks = range(self.num_ranks)
        self._locals = [[[self._in(rank, token) for token in tokens] for tokens in self.choices] for rank in ranks]
        self._received = [self._receive(rank) for rank in ranks]
        self._rows = [self._deliver(rank) for rank in ranks]
        self._places = [{(row.src_rank, row.src_token, row.expert): row.place for row in rows} for rows in self._rows]

    # ------------------------------------------------------------------ places

    def received(self, rank: int) -> list[tuple[int, int]]:
        """Return (source rank, source token) of each token that ``rank`` receives, once, by source, then token."""
        return self._received[rank]

    def expert_counts(self, rank: int) -> list[int]:
        """Return the rows of each local expert: a token counts once per expert, even if it names it repeatedly."""
        counts = [0] * self.num_local
        for src, token in self.received(rank):
            for expert in set(self._local(rank, src, token)) - {-1}:
                counts[expert] += 1
        return counts

    def expert_offsets(self, rank: int) -> list[int]:
        """Return the first row of each expert in the layout EXPERTS, and the end."""
        offsets = [0]
        for count in self.expert_counts(rank):
            offsets.append(offsets[-1] + -(-count // self.alignment) * self.alignment)
        return offsets

    def rows(self, rank: int) -> list[Row]:
        """Return every row that holds data on ``rank``, by place."""
        return self._rows[rank]

    def num_delivered(self, rank: int) -> int:
        """Return the rows of the delivered tensor when the counts are known on the host."""
        if self.layout == "rows":
            return len(self.received(rank))
        return self.expert_offsets(rank)[-1] if self.layout == "experts" else self.num_local * self.capacity

    def place(self, rank: int, src_rank: int, src_token: int, expert: int | None = None) -> int:
        """Return the place of a token on ``rank`` (for a local expert), or -1."""
        return self._places[rank].get((src_rank, src_token, expert), -1)

    def _receive(self, rank: int) -> list[tuple[int, int]]:
        places = []
        for src, tokens in enumerate(self._locals[rank]):
            for token, experts in enumerate(tokens):
                if any(e >= 0 for e in experts):
                    places.append((src, token))
        return places

    def _deliver(self, rank: int) -> list[Row]:
        received = self.received(rank)
        if self.layout == "rows":
            return [Row(place, src, token, None) for place, (src, token) in enumerate(received)]
        rows = []
        offsets = self.expert_offsets(rank)
        for expert in range(self.num_local):
            place = offsets[expert] if self.layout == "experts" else expert * self.capacity
            for src, token in received:
                if expert in self._local(rank, src, token):
                    rows.append(Row(place, src, token, expert))
                    place += 1
        return rows

    def _local(self, rank: int, src: int, token: int) -> list[int]:
        """Return the local expert on ``rank`` of each slot of a token, -1 where it is elsewhere."""
        return self._locals[rank][src][token]

    def _in(self, rank: int, experts: list[int]) -> list[int]:
        first = rank * self.num_local
        return [e - first if first <= e < first + self.num_local else -1 for e in experts]

    # ------------------------------------------------------------------ dispatch

    def x(self, rank: int, values: Sequence[Tensor] | None = None) -> Tensor:
        """Return the rows of `rows(rank)`, in that order: of the inputs, or of ``values``, one ``[T, ...]`` a rank."""
        values = [one.x for one in self.sent] if values is None else values
        taken = [values[row.src_rank][row.src_token] for row in self.rows(rank)]
        return torch.stack(taken) if taken else values[rank][:0]

    def topk_idx(self, rank: int) -> Tensor:
        """Return ``[N, K]`` local expert ids of the tokens received, -1 where the expert is elsewhere."""
        like = self.sent[rank].topk_idx
        ids = [self._local(rank, src, token) for src, token in self.received(rank)]
        return torch.tensor(ids, dtype=like.dtype, device="cpu").reshape(len(ids), like.shape[1])

    def row_idx(self, rank: int) -> Tensor:
        """Return ``[N, K]`` int64: the delivered row of each slot, -1 where there is none."""
        table = []
        for src, token in self.received(rank):
            local = self._local(rank, src, token)
            table.append([self.place(rank, src, token, e) if e >= 0 else -1 for e in local])
        top_k = self.sent[rank].topk_idx.shape[1]
        return torch.tensor(table, dtype=torch.int64, device="cpu").reshape(len(table), top_k)

    def weights(self, rank: int, values: Sequence[Tensor | None] | None = None) -> Tensor:
        """Return the delivered weights: rows ``[N, K]``, 0 elsewhere; experts, masked: one for each of `rows(rank)`."""
        given = [one.topk_weights for one in self.sent] if values is None else values
        table = []
        for row in self.rows(rank):
            weights = given[row.src_rank]
            assert weights is not None
            local = self._local(rank, row.src_rank, row.src_token)
            zero = torch.zeros((), dtype=weights.dtype, device="cpu")
            table.append([w if e >= 0 else zero for w, e in zip(weights[row.src_token], local, strict=True)])
            if row.expert is not None:
                table[-1] = [_sum([w for w, e in zip(table[-1], local, strict=True) if e == row.expert])]
        flat = [weight for line in table for weight in line]
        width = self.sent[rank].topk_idx.shape[1]
        done = torch.stack(flat) if flat else torch.zeros(0, dtype=torch.float32, device="cpu")
        return done.reshape(len(table), width) if self.layout == "rows" else done

    # ------------------------------------------------------------------ combine

    def combine(
        self, rank: int, ys: Sequence[Tensor], biases: Sequence[Tensor] = (), nodes: Sequence[Sequence[int]] = ()
    ) -> Tensor:
        """Return ``[T, H]`` of ``rank``: biases, then one partial sum a rank in rank order, rounded once.

        With several nodes the partial sums of each node are added first, and their sum is rounded too.

        Args:
            rank: The rank of the tokens.
            ys: The answers of each rank, ``[rows, H]`` (masked: ``[L * capacity, H]``).
            biases: Biases of ``rank``, each ``[T, H]``.
            nodes: The ranks of each node; empty: all are one.
        """
        dtype = ys[rank].dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        sums = []
        for token in range(len(self.choices[rank])):
            terms = [bias[token].to(wide) for bias in biases]
            for node in nodes or [range(self.num_ranks)]:
                places = {there: self._home(there, rank, token) for there in node}
                here = [_sum([ys[r][at].to(wide) for at in where]) for r, where in places.items() if where]
                if len(node) == self.num_ranks:
                    terms += here
                elif here:
                    terms.append(_sum(here).to(dtype).to(wide))
            zero = torch.zeros(ys[rank].shape[1], dtype=wide, device="cpu")
            sums.append(_sum([zero, *terms]).to(dtype))
        return torch.stack(sums) if sums else ys[rank].new_empty(0, ys[rank].shape[1])

    def combine_weights(self, rank: int, ws: Sequence[Tensor], nodes: Sequence[Sequence[int]] = ()) -> Tensor:
        """Return ``[T, K]`` float32: rows: slots added in rank order; experts, masked: each slot has its row's weight.

        With several nodes the slots of each node are added first.

        Args:
            rank: The rank of the tokens.
            ws: The weights that each rank returns: rows ``[N, K]``; experts ``[rows]``; masked ``[L * capacity]``.
            nodes: The ranks of each node; empty: all are one.
        """
        table = torch.zeros(self.sent[rank].topk_idx.shape, dtype=torch.float32, device="cpu")
        for token, experts in enumerate(self.choices[rank]):
            for node in nodes or [range(self.num_ranks)]:
                sums = torch.zeros_like(table[token])
                for there in node:
                    if self.layout == "rows":
                        for place in self._home(there, rank, token):
                            sums = sums + ws[there][place]
                        continue
                    for slot, expert in enumerate(experts):
                        if expert >= 0 and expert // self.num_local == there:
                            sums[slot] = ws[there][self.place(there, rank, token, expert % self.num_local)]
                table[token] = table[token] + sums
        return table

    def _home(self, there: int, rank: int, token: int) -> list[int]:
        """Return the places on rank ``there`` of a token of ``rank``, in expert order."""
        keys = [None] if self.layout == "rows" else list(range(self.num_local))
        places = [self.place(there, rank, token, key) for key in keys]
        return [place for place in places if place >= 0]

    # ------------------------------------------------------------------ decoding (layout "masked", capacity R * M)

    def decode_ranges(self, rank: int) -> list[list[tuple[int, int]]]:
        """Return (start, count) of the rows of each local expert from each rank."""
        table = []
        for expert in range(self.num_local):
            sources = [row.src_rank for row in self.rows(rank) if row.expert == expert]
            counts = [sources.count(src) for src in range(self.num_ranks)]
            table.append([(sum(counts[:src]), count) for src, count in enumerate(counts)])
        return table

    def decode_combine(
        self,
        rank: int,
        ys: Sequence[Tensor],
        *,
        fast: bool = False,
        encoding: str = "same",
        nodes: Sequence[Sequence[int]] = (),
    ) -> Tensor:
        """Return ``[T, H]`` of ``rank``: weighted sums in slot order, or (fast) rounded per rank, then in rank order.

        With several nodes the rows of each node are added so first; its sum is rounded, and only that is encoded.

        Args:
            rank: The rank of the tokens.
            ys: The answers of each rank, ``[L * capacity, H]``.
            fast: Sum before the encoding.
            encoding: Encoding of the rows on the way: ``"same"`` (not at all), ``"fp8"`` or ``"logfmt10"``.
            nodes: The ranks of each node; empty: all are one.
        """
        sums = []
        for token in range(len(self.choices[rank])):
            total = torch.zeros(ys[rank].shape[1], dtype=torch.float32, device="cpu")
            for row, weight in self._decode_terms(rank, token, ys, nodes, fast=fast):
                product = encoded_row(row, encoding) * weight
                total = total + product
            sums.append(total.to(ys[rank].dtype))
        return torch.stack(sums) if sums else ys[rank].new_empty(0, ys[rank].shape[1])

    def decode_slack(
        self, rank: int, ys: Sequence[Tensor], *, fast: bool = False, nodes: Sequence[Sequence[int]] = ()
    ) -> tuple[Tensor, Tensor]:
        """Return by how much `decode_combine` over ``"logfmt10"`` changes if each number gets a neighbouring code.

        Returns:
            (``[T, H]``, ``[T, H]``), both float32: that change, and the sum of the magnitudes that were added.
        """
        nothing = torch.zeros(0, ys[rank].shape[1], dtype=torch.float32, device="cpu")
        one_code, sizes = [nothing], [nothing]
        for token in range(len(self.choices[rank])):
            change = torch.zeros(1, ys[rank].shape[1], dtype=torch.float32, device="cpu")
            size = torch.zeros(1, ys[rank].shape[1], dtype=torch.float32, device="cpu")
            for row, weight in self._decode_terms(rank, token, ys, nodes, fast=fast):
                change = change + abs(weight) * torch.cat([_neighbours(group) for group in torch.split(row, LOG_BLOCK)])
                size = size + abs(weight) * encoded_row(row, "logfmt10").abs()
            one_code.append(change)
            sizes.append(size)
        return torch.cat(one_code), torch.cat(sizes)

    def _decode_terms(
        self, rank: int, token: int, ys: Sequence[Tensor], nodes: Sequence[Sequence[int]], *, fast: bool
    ) -> Iterator[tuple[Tensor, float]]:
        """Yield the rows that travel home for one token, in the order of the sum, and their factors."""
        if len(nodes) <= 1:
            yield from self._rows_home(rank, token, ys, range(self.num_ranks), fast=fast)
            return
        for node in nodes:
            total = torch.zeros(ys[rank].shape[1], dtype=torch.float32, device="cpu")
            for row, weight in self._rows_home(rank, token, ys, node, fast=fast):
                product = row.float() * weight
                total = total + product
            yield total.to(ys[rank].dtype), 1.0

    def _rows_home(
        self, rank: int, token: int, ys: Sequence[Tensor], ranks: Sequence[int], *, fast: bool
    ) -> Iterator[tuple[Tensor, float]]:
        """Yield the rows of one token that some ranks send, in the order of the sum, and their factors."""
        weights = self.sent[rank].topk_weights
        assert weights is not None
        if fast:
            for there in ranks:
                yield self._fast_partial(there, rank, token, ys[there], weights[token]), 1.0
            return
        for slot, expert in enumerate(self.choices[rank][token]):
            there, local = divmod(expert, self.num_local)
            if expert >= 0 and there in ranks:
                yield ys[there][self.place(there, rank, token, local)], float(weights[token, slot])

    def _fast_partial(self, there: int, rank: int, token: int, y: Tensor, weights: Tensor) -> Tensor:
        local = self._local(there, rank, token)
        partial = torch.zeros(y.shape[1], dtype=torch.float32, device="cpu")
        for expert in sorted(set(local) - {-1}):
            weight = _sum([w for w, e in zip(weights, local, strict=True) if e == expert])
            product = y[self.place(there, rank, token, expert)].float() * weight
            partial = partial + product
        return partial.to(y.dtype)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """Add from the left, rounding each time."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def fp8_cast(row: Tensor, *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Cast one row ``[H]`` to float8_e4m3fn with a float32 scale for each 128 columns (the last block may be short).

    What is not finite becomes the NaN without a sign, and is 0 to its block.
    """
    casts, scales = [], []
    for first in range(0, row.numel(), FP8_BLOCK):
        given = row[first : first + FP8_BLOCK].float()
        block = torch.where(given.isfinite(), given, 0.0)
        amax = block.abs().amax().clamp(min=1e-4)
        if power_of_two:
            scale = torch.tensor(2.0 ** _ceil_log2(float(amax / FP8_MAX)), dtype=torch.float32, device="cpu")
            factor = 1.0 / scale
        else:
            scale, factor = amax / FP8_MAX, FP8_MAX / amax
        cast = (block * factor).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        casts.append(torch.where(given.isfinite(), cast.view(torch.uint8), FP8_NAN))
        scales.append(scale)
    return torch.cat(casts).view(torch.float8_e4m3fn), torch.stack(scales)


def encoded_row(row: Tensor, encoding: str) -> Tensor:
    """Return one row ``[H]`` as float32, after it travelled in the format ``encoding``."""
    if encoding == "same":
        return row.float()
    if encoding == "fp8":
        data, scales = fp8_cast(row, power_of_two=False)
        blocks = [block.float() * scale for block, scale in zip(torch.split(data, FP8_BLOCK), scales, strict=True)]
        return torch.cat(blocks)
    blocks = []
    for block in torch.split(row, LOG_BLOCK):
        codes, values = logfmt10(block)
        decoded = torch.where(block.signbit(), -values[codes], values[codes]).float()
        if not block.isfinite().all():  # NaN takes the place of the negative zero
            decoded = torch.where(block.isfinite(), torch.where(decoded == 0, 0.0, decoded), torch.nan)
        blocks.append(decoded)
    return torch.cat(blocks)


def logfmt10(block: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes ``[128]`` int64 of the magnitudes of a block, and the values of all 512 codes.

    Each magnitude takes the code whose value is nearest, found by looking at them all. What is not finite counts as 0.
    """
    sizes = torch.where(block.isfinite(), block, 0.0).double().abs()
    some = [size for size in sizes.tolist() if size > 0]
    lo = step = 0.0
    if some:
        hi = _float32(min(math.log2(max(some)), 127.9999))
        lo = min(_float32(max(math.log2(min(some)), hi - 32)), hi)
        step = _float32(_float32(hi - lo) / (LOG_CODES - 2))
    values = torch.tensor(
        [0.0] + [2.0 ** (lo + step * i) for i in range(LOG_CODES - 1)], dtype=torch.float64, device="cpu"
    )
    known = values if step else values[:2]
    # The higher of two equally near codes: argmin gives the first of equal ones.
    distances = (sizes[:, None] - known.flip(0)[None, :]).abs()
    return len(known) - 1 - distances.argmin(1), values


def _neighbours(block: Tensor) -> Tensor:
    """Return how far the value of each number's code is from that of the next code; 0 for zero and the least."""
    codes, values = logfmt10(block)
    gaps = values.diff()
    return torch.where(codes > 1, torch.maximum(gaps[codes.clamp(max=LOG_CODES - 2)], gaps[codes - 1]), 0.0).float()


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32, device="cpu"))


def _ceil_log2(value: float) -> int:
    fraction, exponent = math.frexp(value)
    return exponent - 1 if fraction == 0.5 else exponent


def ue8m0(scales: Tensor) -> Tensor:
    """Pack powers of two ``[S]`` as exponent bytes, four to an int32, lowest byte first; missing bytes are 0."""
    packed = []
    for first in range(0, scales.numel(), 4):
        word = 0
        for byte, scale in enumerate(scales[first : first + 4].tolist()):
            word |= (_ceil_log2(scale) + 127) << (8 * byte)
        packed.append(word - (1 << 32) if word >= 1 << 31 else word)
    return torch.tensor(packed, dtype=torch.int32, device="cpu")
