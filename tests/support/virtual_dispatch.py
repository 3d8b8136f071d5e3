"""The dispatch kernel on virtual ranks: what they send, and every byte that has to arrive."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from support.row_bytes import as_bytes, check_rows
from support.virtual_plan import Expected
from support.virtual_ranks import Block, Ranks, dynamic_bytes, offsets
from tokenferry.kernels.dispatch import spec as dispatch_spec
from tokenferry.kernels.dispatch_assign import spec as assign_spec


@dataclass(frozen=True)
class Scales:
    """Scales of a row: their number, type and layout: row by row, column by column, or in wider rows."""

    num: int
    dtype: torch.dtype
    lie: str = "rows"

    @property
    def row_bytes(self) -> int:
        return self.num * self.dtype.itemsize

    @property
    def bulk(self) -> bool:
        return self.lie == "rows" and self.row_bytes % 16 == 0

    def of(self, num_tokens: int, make: torch.Generator) -> Tensor:
        wide = self.num + (self.lie == "wide") * 3
        data = torch.randint(256, (num_tokens, wide * self.dtype.itemsize), dtype=torch.uint8, generator=make)
        made = data.view(self.dtype)[:, : self.num]
        return made.t().contiguous().t() if self.lie == "columns" else made


@dataclass(frozen=True)
class Payload:
    """The data of a row."""

    row_bytes: int
    scales: Scales | None = None
    weights: bool = False
    first: bool = True
    idx_dtype: torch.dtype = torch.int64
    blocks: int = 2

    def __str__(self) -> str:
        scales = f"-{self.scales.num}x{str(self.scales.dtype)[6:]}-{self.scales.lie}" if self.scales else ""
        kind = "first" if self.first else "again"
        return f"{self.row_bytes}{scales}-w{int(self.weights)}-{kind}-{str(self.idx_dtype)[6:]}"


@dataclass
class Brought:
    """The input of one source; ``names``: the numbers of its tokens where they come from, None: as here."""

    x: Tensor
    scale: Tensor | None
    weights: Tensor | None
    topk_idx: Tensor
    names: Tensor | None = None


@dataclass
class Landed:
    """The receive buffers of one rank."""

    rows: Block
    scale: Block | None
    weights: Block | None
    ids: Block | None
    src_token: Block | None
    row_idx: Block | None

    def blocks(self) -> tuple[Block | None, ...]:
        return self.rows, self.scale, self.weights, self.ids, self.src_token, self.row_idx


class Delivery:
    """The launches of dispatch on all ranks: one for each segment of the plan, whose sources ``topk_idx`` belong to."""

    def __init__(
        self, ranks: Ranks, expected: Expected, payload: Payload, topk_idx: list[Tensor], seed: int = 0
    ) -> None:
        self.ranks, self.expected, self.payload = ranks, expected, payload
        make = torch.Generator().manual_seed(seed)
        self.brought = []
        for index in topk_idx:
            T, K = index.shape
            x = torch.randint(256, (T, payload.row_bytes), dtype=torch.uint8, generator=make)
            scale = payload.scales.of(T, make) if payload.scales else None
            weights = torch.randn(T, K, generator=make) if payload.weights else None
            names = torch.arange(T).int() * 3 + 1 if len(self.brought) >= ranks.num_ranks else None
            self.brought.append(Brought(x, scale, weights, index.to(payload.idx_dtype), names))
        self.landed = [self._room(rank) for rank in range(ranks.num_ranks)]

    def _room(self, rank: int) -> Landed:
        ex, payload, block = self.expected, self.payload, self.ranks.block
        # A few places more than there are: where counts stay on the device, there are.
        N, D, K = ex.num_received(rank) + 3, ex.num_delivered(rank) + 5, ex.top_k
        by_expert, first = ex.form.by_expert, payload.first
        return Landed(
            rows=block(rank, D * payload.row_bytes),
            scale=block(rank, D * payload.scales.row_bytes) if payload.scales else None,
            weights=block(rank, D * 4 if by_expert else D * 4 * K) if payload.weights else None,
            ids=block(rank, N * K * payload.idx_dtype.itemsize) if first else None,
            src_token=block(rank, N * 8) if first else None,
            row_idx=block(rank, N * K * 8) if first and by_expert else None,
        )

    def fields(self, rank: int, segment: int = 0, **more: object) -> dict[str, object]:
        """Return the params of dispatch."""
        ex, payload, up, first = self.expected, self.payload, self.ranks.on_device, segment * self.ranks.num_ranks
        src, peers = first + rank, slice(first, first + self.ranks.num_ranks)
        mine = self.brought[src]
        scales = payload.scales
        bulk = scales.row_bytes if scales and scales.bulk else 0
        rings = dispatch_spec.cut(payload.row_bytes, bulk, dynamic_bytes(dispatch_spec.SPEC))
        values: dict[str, object] = {
            "x": up(mine.x),
            "places": up(ex.table(src)),
            "rows_out": up(torch.tensor(ex.dst_counts(rank)[peers])),
            "rows_in": up(torch.tensor(ex.src_counts(rank)[peers])),
            "num_tokens": mine.x.shape[0],
            "row_bytes": payload.row_bytes,
            "piece_bytes": rings.piece_bytes,
            "pitch": rings.pitch,
            "pieces": rings.pieces,
            "stages": rings.stages,
            "bulk_scale_bytes": bulk,
            "top_k": ex.top_k,
            "width": assign_spec.num_columns(ex.num_ranks, ex.top_k, by_expert=ex.form.by_expert),
            "num_local": ex.num_local,
            "by_expert": int(ex.form.by_expert),
            "wide": int(payload.idx_dtype is torch.int64),
            "handshake": {0: 1, 3: payload.row_bytes, **offsets(*self.landed[rank].blocks())},
        }
        if scales and mine.scale is not None:
            scale = up(mine.scale)
            values["scale"] = scale
            if not bulk:
                strides = {"scale_row_stride": scale.stride(0), "scale_stride": scale.stride(1)}
                values |= {"small_scale": 1, "scale_size": scales.dtype.itemsize, "num_scales": scales.num, **strides}
        if mine.weights is not None:
            values["weights"] = up(mine.weights)
        if payload.first:
            values["topk_idx"] = up(mine.topk_idx)
        if mine.names is not None:
            values["tokens"] = up(mine.names)
        return {**values, **more}

    def sizes(self) -> tuple[int, int, int]:
        scales = self.payload.scales
        bulk = scales.row_bytes if scales and scales.bulk else 0
        rings = dispatch_spec.cut(self.payload.row_bytes, bulk, dynamic_bytes(dispatch_spec.SPEC))
        return self.payload.blocks, rings.warps * 32, rings.smem_bytes

    def run(self) -> None:
        for segment in range(self.expected.segments):
            fields = [self.fields(rank, segment) for rank in range(self.ranks.num_ranks)]
            self.ranks.run(dispatch_spec.SPEC, fields, self.sizes())

    # ------------------------------------------------------------------ expected output

    def check(self) -> None:
        for rank in range(self.ranks.num_ranks):
            self.check_rank(rank)

    def check_rank(self, rank: int) -> None:
        ex, payload, landed, K = self.expected, self.payload, self.landed[rank], self.expected.top_k
        what = f"{payload} {ex.form.layout} rank {rank}"
        received = ex.received(rank)
        places = [ex.first_place(src, token, rank) for src, token in received]
        x = [self.brought[src].x[token] for src, token in received]
        check_rows(f"{what} rows", landed.rows, places, x, payload.row_bytes)
        if landed.scale:
            scale = [as_bytes(self.brought[src].scale[token]) for src, token in received]
            check_rows(f"{what} scale", landed.scale, places, scale, payload.scales.row_bytes)
        if landed.weights and ex.form.by_expert:
            sums = self.weight_sums(rank)
            check_rows(f"{what} weights", landed.weights, list(sums), [as_bytes(one) for one in sums.values()], 4)
        elif landed.weights:
            check_rows(f"{what} weights", landed.weights, places, self.weight_rows(rank), 4 * K)
        if landed.ids:
            order, size = list(range(len(received))), payload.idx_dtype.itemsize
            ids = [as_bytes(one) for one in ex.ids(rank, payload.idx_dtype)]
            check_rows(f"{what} ids", landed.ids, order, ids, K * size)
            tokens = [as_bytes(torch.tensor([self.name(src, token)])) for src, token in received]
            check_rows(f"{what} src_token", landed.src_token, order, tokens, 8)
        if landed.row_idx:
            row_idx = [as_bytes(one) for one in ex.row_idx(rank)]
            check_rows(f"{what} row_idx", landed.row_idx, order, row_idx, K * 8)

    def name(self, src: int, token: int) -> int:
        """Return the number of a token where it comes from."""
        names = self.brought[src].names
        return token if names is None else int(names[token])

    def weight_rows(self, rank: int) -> list[Tensor]:
        """Return the weights of each row (ROWS): those of slots on this rank, 0 for others."""
        ids = self.expected.ids(rank, torch.int64)
        rows = []
        for row, (src, token) in enumerate(self.expected.received(rank)):
            rows.append(as_bytes(torch.where(ids[row] >= 0, self.brought[src].weights[token], 0.0)))
        return rows

    def weight_sums(self, rank: int) -> dict[int, Tensor]:
        """Return the weight of each place (by expert): the sum over the slots that name it, in slot order."""
        ex, sums = self.expected, {}
        for src, token in ex.received(rank):
            for k, e in enumerate(ex.choices[src][token]):
                if e >= 0 and e // ex.num_local == rank:
                    place = ex.place(src, token, e)
                    sums[place] = sums.get(place, torch.zeros(1)) + self.brought[src].weights[token, k]
        return sums
