"""The kernels combine_pull and stage_input alone, on virtual ranks: sums in the documented order, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from test_dispatch_kernel import check_rows
from torch import Tensor

from support.virtual_ranks import POISON, Block, Ranks, offsets, ranks_of
from tokenferry.kernels.codes import PIECE_BYTES
from tokenferry.kernels.codes import TYPES as TYPE_CODES
from tokenferry.kernels.combine_pull import spec as pull_spec
from tokenferry.kernels.control_block import RANK_SHIFT
from tokenferry.kernels.stage_input import spec as stage_spec
from tokenferry.testing.cases import payload
from tokenferry.testing.compare import same_bits

TYPES = tuple(TYPE_CODES)
by_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])


@dataclass(frozen=True)
class Sizes:
    """One situation.

    Attributes:
        tokens: T of each rank.
        row_bytes: Bytes of a row.
        width: Entries of a token.
        num_places: Rows that each rank has.
        biases: How many.
        blocks: Blocks of the grid.
        seed: Makes another one.
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
        return -(-self.row_bytes // PIECE_BYTES)


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
        return self.sizes.blocks, pull_spec.MAX_WARPS * 32, pull_spec.SMEM_BYTES

    @property
    def config(self) -> dict[str, int]:
        return {"type": TYPE_CODES[self.dtype]}

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


def pull(sizes: Sizes, dtype: torch.dtype) -> None:
    one = Pull(ranks_of(sizes.num_ranks), sizes, dtype)
    one.run()
    one.check()


# ---------------------------------------------------------------------- sums


@by_type
@pytest.mark.parametrize("num_ranks", [1, 2, 5, 8])
def test_every_type(num_ranks, dtype):
    i = TYPES.index(dtype)
    tokens = (40, 0, 13, 1, 29, 2, 0, 7)[:num_ranks]
    for biases, row_bytes in enumerate((48, 2048, 4112)):
        pull(Sizes(tokens, row_bytes, 8, biases=(biases + i) % 3, seed=i), dtype)


@pytest.mark.parametrize("row_bytes", [16, 32, 496, 512, 528, 2032, 2048, 2064, 4096, 14336, 65536])
def test_rows_of_every_size(row_bytes):
    """A piece has 2048 bytes, a chunk of a warp 512."""
    tokens, places = ((30, 11, 5), 50) if row_bytes < 10_000 else ((9, 4, 2), 12)
    pull(Sizes(tokens, row_bytes, 6, places, biases=1), torch.bfloat16)
    pull(Sizes(tokens, row_bytes, 6, places, biases=2), torch.float32)
    pull(Sizes(tokens, row_bytes, 6, places), torch.float16)


@pytest.mark.parametrize("width", [1, 3, 4, 5, 31, 32, 33, 63, 64])
def test_tables_of_every_width(width):
    """Four rows make a group; a lane has entries i and i + 32."""
    pull(Sizes((25, 14), 272, width, seed=width), torch.float32)


def test_more_units_than_warps():
    """One block has twelve warps; every ring wraps around many times, in tokens and in pieces."""
    pull(Sizes((150, 70), 6160, 9, blocks=1), torch.bfloat16)


def test_the_same_bits_with_a_late_rank_and_any_grid():
    seen = []
    for late, blocks in ((None, 1), (0, 2), (1, 3), (2, 4)):
        one = Pull(ranks_of(3), Sizes((60, 31, 8), 4112, 8, biases=1), torch.bfloat16)
        if late is not None:
            one.ranks.delay(late, 5)
        fields = [one.fields(rank) for rank in range(3)]
        one.ranks.run(pull_spec.SPEC, fields, (blocks, *one.launch_sizes()[1:]), one.config)
        one.check()
        seen.append(torch.cat([out.view(torch.int16).cpu() for out in one.out]))
    assert all(bits.equal(seen[0]) for bits in seen)


@pytest.mark.parametrize("width", [8, 40])
def test_ranks_that_take_no_part_contribute_nothing(width):
    """Ranks 1 and 3 do not launch: no rank waits for them, and their rows, all NaN, are not read."""
    ranks = Ranks(4)
    one = Pull(ranks, Sizes((20, 5, 9, 6), 528, width, biases=1), torch.float32, alive=0b0101)
    for rank in (1, 3):  # their handshakes are not read; these point to rows of NaN
        ranks.words(rank, "handshake", 8192).fill_(-1)
    one.run(only=(0, 2))
    one.check(only=(0, 2))
    assert (one.out[1].view(torch.uint8) == POISON).all()
    assert ranks.epochs() == [1, 0, 1, 0]


# ---------------------------------------------------------------------- weights


@dataclass
class Weights:
    """Weights that are returned: those of each rank, one a place, and the places of each token's slots."""

    pull: Pull
    top_k: int
    blocks: list[Block] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    slots: list[list[Entries]] = field(default_factory=list)
    out: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        ranks, sizes, pick = self.pull.ranks, self.pull.sizes, self.pull.pick
        for rank, T in enumerate(sizes.tokens):
            self.values.append(payload(torch.arange(sizes.num_places) + 1009 * rank, 1, torch.float32))
            self.blocks.append(ranks.block(rank, self.values[-1].numel() * 4))
            self.blocks[-1].tensor.copy_(self.values[-1].view(torch.uint8).flatten())
            named = lambda: (pick.randrange(ranks.num_ranks), pick.randrange(sizes.num_places))  # noqa: E731
            chosen = [[named() if pick.random() < 0.7 else (-1, -1) for _ in range(self.top_k)] for _ in range(T)]
            self.slots.append(chosen)
            self.out.append(ranks.poisoned(T, self.top_k, dtype=torch.float32))

    def fields(self, rank: int) -> dict[str, object]:
        R = self.pull.ranks.num_ranks
        table = torch.full((len(self.slots[rank]), R + self.top_k + 1), -1, dtype=torch.int32)
        for token, slots in enumerate(self.slots[rank]):
            for k, (r, place) in enumerate(slots):
                table[token, R + k] = -1 if r < 0 else r << RANK_SHIFT | place
        more = {
            "places": self.pull.ranks.on_device(table),
            "places_stride": table.shape[1],
            "top_k": self.top_k,
            "weights_out": self.out[rank],
            "handshake": {0: 3, **offsets(self.pull.blocks[rank], self.blocks[rank])},
        }
        return self.pull.fields(rank, **more)

    def want(self, rank: int) -> Tensor:
        table = torch.zeros(len(self.slots[rank]), self.top_k)
        for token, slots in enumerate(self.slots[rank]):
            for k, (r, place) in enumerate(slots):
                if r >= 0:
                    table[token, k] = self.values[r][place, 0]
        return table


@pytest.mark.parametrize("top_k", [1, 8, 64])
def test_weights_are_returned(top_k):
    one = Pull(ranks_of(3), Sizes((40, 0, 21), 4112, 6, biases=1), torch.bfloat16)
    weights = Weights(one, top_k)
    one.ranks.run(pull_spec.SPEC, [weights.fields(rank) for rank in range(3)], one.launch_sizes(), one.config)
    one.check()
    for rank in range(3):
        same_bits(f"weights of rank {rank}", weights.out[rank], weights.want(rank))


# ---------------------------------------------------------------------- stage_input


def stage_fields(ranks, rank, source, block, counts, *, aborted=False):
    """Return params of stage_input for ``source`` ``[L * capacity, row_bytes]``; ``counts``: rows of each expert."""
    return {
        "source": ranks.on_device(source),
        "to": block.address,
        "src_counts": ranks.on_device(torch.full((ranks.num_ranks,), -1 if aborted else 5)),
        "expert_counts": ranks.on_device(torch.tensor(counts, dtype=torch.int32)),
        "num_local": len(counts),
        "capacity": source.shape[0] // len(counts),
        "row_bytes": source.shape[1],
    }


def random_rows(num_rows, row_bytes, seed):
    make = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num_rows, row_bytes), dtype=torch.uint8, generator=make)


@pytest.mark.parametrize("row_bytes", [16, 48, 2000, 14336])
def test_stage_copies_rows_below_the_counts(row_bytes):
    ranks = ranks_of(2)
    capacity, counts = 11, ([0, 11, 3, 7], [1, 0, 0, 10])
    sources = [random_rows(4 * capacity, row_bytes, rank) for rank in range(2)]
    blocks = [ranks.block(rank, sources[rank].numel()) for rank in range(2)]
    fields = [stage_fields(ranks, rank, sources[rank], blocks[rank], counts[rank]) for rank in range(2)]
    ranks.run(stage_spec.SPEC, fields, (3, stage_spec.THREADS, 0))
    for rank in range(2):
        places = [e * capacity + i for e, count in enumerate(counts[rank]) for i in range(count)]
        check_rows(f"rank {rank}", blocks[rank], places, [sources[rank][place] for place in places], row_bytes)


def test_stage_has_more_rows_than_warps():
    ranks = ranks_of(1)
    source = random_rows(2 * 300, 272, 0)
    block = ranks.block(0, source.numel())
    ranks.run(stage_spec.SPEC, [stage_fields(ranks, 0, source, block, [300, 171])], (1, stage_spec.THREADS, 0))
    check_rows("rank 0", block, list(range(471)), list(source[:471]), 272)


def test_an_aborted_plan_stages_nothing():
    ranks = ranks_of(2)
    blocks = [ranks.block(rank, 8 * 64) for rank in range(2)]
    rows = random_rows(8, 64, 0)
    fields = [stage_fields(ranks, rank, rows, blocks[rank], [4, 4], aborted=True) for rank in range(2)]
    ranks.run(stage_spec.SPEC, fields, (1, stage_spec.THREADS, 0))
    for block in blocks:
        check_rows("an aborted plan", block, [], [], 64)
