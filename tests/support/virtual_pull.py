"""The combine_pull kernel on virtual ranks: random entries, and sums in the stated order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from support.virtual_ranks import Block, Ranks, dynamic_bytes, offsets
from tokenferry.kernels import codes
from tokenferry.kernels.combine_pull import spec as pull_spec
from tokenferry.kernels.control_block import RANK_SHIFT
from tokenferry.testing.cases import payload
from tokenferry.testing.compare import same_bits

TYPES = tuple(codes.TYPES)
by_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])


@dataclass(frozen=True)
class Sizes:
    """One situation.

    Attributes:
        tokens: T of each rank.
        row_bytes: Bytes of a row.
        width: Entries of a token.
        num_places: Rows that each rank has.
        biases: Number of biases.
        blocks: Blocks of the grid.
        seed: Seed of the case.
    """

    tokens: tuple[int, ...]
    row_bytes: int
    width: int
    num_places: int = 50
    biases: int = 0
    blocks: int = 2
    seed: int = 0

    @property
    def num_ranks(self) -> int:
        return len(self.tokens)

    @property
    def pieces(self) -> int:
        return -(-self.row_bytes // pull_spec.PIECE_BYTES)


Entries = list[tuple[int, int]]
"""(rank, place) of each entry of a token, by rank; (-1, -1) for none."""


class Pull:
    """One launch on all ranks, with random entries; only the rows that they name may be read."""

    def __init__(self, ranks: Ranks, sizes: Sizes, dtype: torch.dtype, alive: int | None = None) -> None:
        self.ranks, self.sizes, self.dtype = ranks, sizes, dtype
        self.alive = (1 << ranks.num_ranks) - 1 if alive is None else alive
        self.hidden = sizes.row_bytes // dtype.itemsize
        self.pick = random.Random(f"{sizes} {dtype}")
        self.entries = [[self._choose() for _ in range(T)] for T in sizes.tokens]
        self.rows = self._rows()
        self.biases = [
            [payload(torch.arange(T) + 31 * rank + 7 * i, self.hidden, dtype) for i in range(sizes.biases)]
            for rank, T in enumerate(sizes.tokens)
        ]
        self.blocks = [self._block(rank) for rank in range(ranks.num_ranks)]
        self.out = [ranks.poisoned(T, self.hidden, dtype=dtype) for T in sizes.tokens]

    def _choose(self) -> Entries:
        """Return the entries of one token, followed by empty ones."""
        R, W, places = self.ranks.num_ranks, self.sizes.width, self.sizes.num_places
        wanted = self.pick.choice((0, 1, W, self.pick.randint(0, W)))
        chosen = [(self.pick.randrange(R), self.pick.randrange(places)) for _ in range(wanted)]
        return sorted(chosen) + [(-1, -1)] * (W - wanted)

    def _rows(self) -> list[Tensor]:
        """Return ``[places, H]`` of each rank, NaN where no rank may read: also all rows of ranks that take no part."""
        named = {one for tokens in self.entries for entries in tokens for one in entries}
        tables = []
        for rank in range(self.ranks.num_ranks):
            table = torch.full((self.sizes.num_places, self.hidden), torch.nan, dtype=self.dtype)
            places = sorted(place for r, place in named if r == rank) if self.alive >> rank & 1 else []
            if places:
                table[torch.tensor(places)] = payload(
                    torch.tensor(places) + 100_003 * rank + self.sizes.seed, self.hidden, self.dtype
                )
            tables.append(table)
        return tables

    def _block(self, rank: int) -> Block:
        block = self.ranks.block(rank, self.sizes.num_places * self.sizes.row_bytes)
        block.tensor.copy_(self.rows[rank].view(torch.uint8).flatten())
        return block

    # ------------------------------------------------------------------ the launch

    def table(self, rank: int) -> Tensor:
        """Return the entries as the kernel reads them, part of a wider table."""
        wide = torch.full((self.sizes.tokens[rank], self.sizes.width + 5), 0x0FFFFFF7, dtype=torch.int32)
        for token, entries in enumerate(self.entries[rank]):
            for j, (r, place) in enumerate(entries):
                wide[token, 3 + j] = -1 if r < 0 else r << RANK_SHIFT | place
        return self.ranks.on_device(wide)[:, 3 : 3 + self.sizes.width]

    def fields(self, rank: int, **more: object) -> dict[str, object]:
        """Return the params of combine_pull."""
        sizes, up, R = self.sizes, self.ranks.on_device, self.ranks.num_ranks
        table = self.table(rank)
        values: dict[str, object] = {
            "alive": self.alive,
            "table": table,
            "table_stride": table.stride(0),
            "width": sizes.width,
            "out": self.out[rank],
            "rows_out": up(torch.tensor([10 * rank + r for r in range(R)])),
            "rows_in": up(torch.tensor([10 * r + rank for r in range(R)])),
            "num_tokens": sizes.tokens[rank],
            "row_bytes": sizes.row_bytes,
            "pieces": sizes.pieces,
            "handshake": {0: 3, 2: sizes.row_bytes, **offsets(self.blocks[rank])},
        }
        values |= {f"bias{i}": up(bias) for i, bias in enumerate(self.biases[rank])}
        return {**values, **more}

    def launch_sizes(self) -> tuple[int, int, int]:
        warps = pull_spec.num_warps(dynamic_bytes(pull_spec.SPEC))
        return self.sizes.blocks, warps * 32, warps * pull_spec.WARP_BYTES

    @property
    def config(self) -> dict[str, int]:
        return {"type": codes.TYPES[self.dtype]}

    def run(self, only: Sequence[int] | None = None) -> None:
        here = range(self.ranks.num_ranks) if only is None else only
        fields = [self.fields(rank) if rank in here else None for rank in range(self.ranks.num_ranks)]
        self.ranks.run(pull_spec.SPEC, fields, self.launch_sizes(), self.config)

    # ------------------------------------------------------------------ expected output

    def want(self, rank: int) -> Tensor:
        """Return the sums, by torch on the CPU, one operation after the other."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        sums = torch.zeros(self.sizes.tokens[rank], self.hidden, dtype=wide)
        for token, entries in enumerate(self.entries[rank]):
            total = torch.zeros(self.hidden, dtype=wide)
            for bias in self.biases[rank]:
                total = total + bias[token].to(wide)
            partial: dict[int, Tensor] = {}
            for r, place in entries:
                if r >= 0 and self.alive >> r & 1:
                    row = self.rows[r][place].to(wide)
                    partial[r] = partial[r] + row if r in partial else row
            for r in sorted(partial):
                total = total + partial[r]
            sums[token] = total
        return sums.to(self.dtype)

    def check(self, only: Sequence[int] | None = None) -> None:
        for rank in range(self.ranks.num_ranks) if only is None else only:
            same_bits(f"{self.sizes} {self.dtype} rank {rank}", self.out[rank], self.want(rank))
            self.blocks[rank].cpu()
