"""The kernels `pull` and `stage` alone, on virtual ranks: sums in the stated order, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from test_move import check_rows
from torch import Tensor
from virtual import POISON, Block, Ranks, offsets, ranks_of

from tokenferry.kernels import describe
from tokenferry.kernels.board import RANK_SHIFT
from tokenferry.kernels.pull import spec as pull_spec
from tokenferry.kernels.pull.spec import Mode
from tokenferry.kernels.stage import spec as stage_spec
from tokenferry.testing.cases import payload
from tokenferry.testing.compare import same_bits

TYPES = tuple(describe.TYPES)
CONFIGS = [(dtype, mode) for dtype in TYPES for mode in Mode if (dtype, mode) != (torch.float64, Mode.weighted)]
by_config = pytest.mark.parametrize(
    ("dtype", "mode"), CONFIGS, ids=[f"{str(dtype)[6:]}-{mode.name}" for dtype, mode in CONFIGS]
)


@dataclass(frozen=True)
class Sizes:
    """One situation.

    Attributes:
        tokens: T of each rank.
        row_bytes: Of a row.
        width: W: entries of a token; None: one a rank, whose column says which.
        num_places: Rows that each rank has.
        biases: How many.
        blocks: Of the grid.
        seed: Makes another one.
    """

    tokens: tuple[int, ...]
    row_bytes: int
    width: int | None = None
    num_places: int = 50
    biases: int = 0
    blocks: int = 2
    seed: int = 0

    @property
    def num_ranks(self) -> int:
        return len(self.tokens)


Entries = list[tuple[int, int]]
"""(rank, place) of each entry, (-1, -1) for none."""


class Pull:
    """One launch on all ranks: random entries, rows of which only those that are named may be read."""

    def __init__(self, ranks: Ranks, sizes: Sizes, dtype: torch.dtype, mode: Mode, alive: int | None = None) -> None:
        self.ranks, self.sizes, self.dtype, self.mode = ranks, sizes, dtype, mode
        self.alive = (1 << ranks.num_ranks) - 1 if alive is None else alive
        self.hidden = sizes.row_bytes // dtype.itemsize
        self.pick = random.Random(f"{sizes} {dtype} {mode}")
        self.entries = [[self._choose() for _ in range(T)] for T in sizes.tokens]
        self.rows = self._rows()
        self.own: dict[int, Tensor] = {}  # what a rank reads instead of its rows in the heap
        self.weights = [
            payload(torch.arange(T) + 977 * rank, self.width, torch.float32) for rank, T in enumerate(sizes.tokens)
        ]
        self.biases = [
            [payload(torch.arange(T) + 31 * rank + 7 * i, self.hidden, dtype) for i in range(sizes.biases)]
            for rank, T in enumerate(sizes.tokens)
        ]
        self.blocks = [self._block(rank) for rank in range(ranks.num_ranks)]
        self.out = [ranks.poisoned(T, self.hidden, dtype=dtype) for T in sizes.tokens]

    @property
    def width(self) -> int:
        return self.sizes.width or self.ranks.num_ranks

    @property
    def by_rank(self) -> bool:
        return self.sizes.width is None

    def _choose(self) -> Entries:
        """Entries of one token: in rank order if by rank or grouped, as they come if weighted; with gaps."""
        R, places = self.ranks.num_ranks, self.sizes.num_places
        if self.by_rank:
            return [(r, self.pick.randrange(places)) if self.pick.random() < 0.7 else (-1, -1) for r in range(R)]
        wanted = self.pick.choice((0, 1, self.width, self.pick.randint(0, self.width)))
        chosen = [(self.pick.randrange(R), self.pick.randrange(places)) for _ in range(wanted)]
        if self.mode is not Mode.weighted:
            return sorted(chosen) + [(-1, -1)] * (self.width - wanted)
        chosen += [(-1, -1)] * (self.width - wanted)
        self.pick.shuffle(chosen)
        return chosen

    def _rows(self) -> list[Tensor]:
        """``[places, H]`` of each rank, NaN where nobody may read: also all rows of ranks that take no part."""
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

    def table(self, rank: int, columns_before: int = 3) -> tuple[Tensor, int]:
        """The entries as the kernel wants them, in a wider table; and the bytes before the first column."""
        wide = torch.full((self.sizes.tokens[rank], columns_before + self.width + 2), 0x0FFFFFF7, dtype=torch.int32)
        for token, entries in enumerate(self.entries[rank]):
            for j, (r, place) in enumerate(entries):
                value = -1 if r < 0 else place if self.by_rank else r << RANK_SHIFT | place
                wide[token, columns_before + j] = value
        return self.ranks.on_device(wide), 4 * columns_before

    def fields(self, rank: int, **more: object) -> dict[str, object]:
        """Params of `pull`."""
        sizes, up, R = self.sizes, self.ranks.on_device, self.ranks.num_ranks
        table, first = self.table(rank)
        self.keep = [*getattr(self, "keep", []), table]
        biases = [up(bias) for bias in self.biases[rank]]
        values: dict[str, object] = {
            "alive": self.alive,
            "table": table.data_ptr() + first,
            "table_stride": table.shape[1],
            "width": self.width,
            "by_rank": int(self.by_rank),
            "out": self.out[rank],
            "rows_out": up(torch.tensor([10 * rank + r for r in range(R)])),
            "rows_in": up(torch.tensor([10 * r + rank for r in range(R)])),
            "num_tokens": sizes.tokens[rank],
            "row_bytes": sizes.row_bytes,
            "pieces": -(-sizes.row_bytes // pull_spec.PIECE_BYTES),
            "card": {0: 3, 2: sizes.row_bytes, **offsets(self.blocks[rank])},
        }
        values |= {f"bias{i}": bias for i, bias in enumerate(biases)}
        if self.mode is Mode.weighted:
            values["weights"] = up(self.weights[rank])
        return {**values, **more}

    def launch_sizes(self) -> tuple[int, int, int]:
        return self.sizes.blocks, pull_spec.MAX_WARPS * 32, pull_spec.SMEM_BYTES

    @property
    def config(self) -> dict[str, int]:
        return {"type": describe.TYPES[self.dtype], "mode": int(self.mode)}

    def run(self, only: Sequence[int] | None = None) -> None:
        here = range(self.ranks.num_ranks) if only is None else only
        fields = [self.fields(rank) if rank in here else None for rank in range(self.ranks.num_ranks)]
        self.ranks.run(pull_spec.SPEC, fields, self.launch_sizes(), self.config)

    # ------------------------------------------------------------------ what has to come out

    def want(self, rank: int) -> Tensor:
        """By torch on the CPU, one operation after the other."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        sums = torch.zeros(self.sizes.tokens[rank], self.hidden, dtype=wide)
        for token, entries in enumerate(self.entries[rank]):
            total = torch.zeros(self.hidden, dtype=wide)
            for bias in self.biases[rank]:
                total = total + bias[token].to(wide)
            partial: dict[int, Tensor] = {}
            for j, (r, place) in enumerate(entries):
                if r < 0 or not self.alive >> r & 1:
                    continue
                row = (self.own.get(rank, self.rows[r]) if r == rank else self.rows[r])[place].to(wide)
                if self.mode is Mode.rows:
                    total = total + row
                elif self.mode is Mode.weighted:
                    product = row * self.weights[rank][token, j]
                    total = total + product
                else:
                    partial[r] = partial[r] + row if r in partial else row
            for r in sorted(partial):
                total = total + partial[r]
            sums[token] = total
        return sums.to(self.dtype)

    def check(self, only: Sequence[int] | None = None) -> None:
        for rank in range(self.ranks.num_ranks) if only is None else only:
            same_bits(f"{self.sizes} {self.dtype} {self.mode.name} rank {rank}", self.out[rank], self.want(rank))
            self.blocks[rank].cpu()


def pull(sizes: Sizes, dtype: torch.dtype, mode: Mode) -> None:
    one = Pull(ranks_of(sizes.num_ranks), sizes, dtype, mode)
    one.run()
    one.check()


# ---------------------------------------------------------------------- sums


@by_config
@pytest.mark.parametrize("num_ranks", [1, 2, 5, 8])
def test_every_type_and_mode(num_ranks, dtype, mode):
    i = CONFIGS.index((dtype, mode))
    tokens = (40, 0, 13, 1, 29, 2, 0, 7)[:num_ranks]
    pull(Sizes(tokens, (48, 2048, 4112)[i % 3], 8, biases=i % 3, seed=i), dtype, mode)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_a_row_a_rank(num_ranks, dtype):
    for biases in (0, 1, 2):
        pull(Sizes((33, 20, 0, 1, 9, 4, 2, 50)[:num_ranks], 1040, biases=biases), dtype, Mode.rows)


@pytest.mark.parametrize("row_bytes", [16, 32, 496, 512, 528, 2032, 2048, 2064, 4096, 14336, 65536])
def test_rows_of_every_size(row_bytes):
    """A piece has 2048 bytes, a chunk of a warp 512."""
    tokens, places = ((30, 11, 5), 50) if row_bytes < 10_000 else ((9, 4, 2), 12)
    pull(Sizes(tokens, row_bytes, 6, places, biases=1), torch.bfloat16, Mode.grouped)
    pull(Sizes(tokens, row_bytes, None, places, biases=2), torch.float32, Mode.rows)
    pull(Sizes(tokens, row_bytes, 6, places), torch.float16, Mode.weighted)


@pytest.mark.parametrize("width", [1, 3, 4, 5, 31, 32, 33, 63, 64])
def test_tables_of_every_width(width):
    """Four rows make a group; a lane has entries i and i + 32."""
    for mode in (Mode.grouped, Mode.weighted):
        pull(Sizes((25, 14), 272, width, seed=width), torch.float32, mode)


def test_more_units_than_warps():
    """One block has twelve warps; every warp's ring comes round many times, in tokens and in pieces."""
    for mode in Mode:
        width = None if mode is Mode.rows else 9
        pull(Sizes((150, 70), 6160, width, blocks=1), torch.bfloat16, mode)


def test_the_same_bits_with_a_late_rank_and_any_grid():
    seen = []
    for late, blocks in ((None, 1), (0, 2), (1, 3), (2, 4)):
        sizes = Sizes((60, 31, 8), 4112, 8, biases=1, blocks=2)
        one = Pull(ranks_of(3), sizes, torch.bfloat16, Mode.grouped)
        if late is not None:
            one.ranks.delay(late, 5)
        fields = [one.fields(rank) for rank in range(3)]
        one.ranks.run(pull_spec.SPEC, fields, (blocks, *one.launch_sizes()[1:]), one.config)
        one.check()
        seen.append(torch.cat([out.view(torch.int16).cpu() for out in one.out]))
    assert all(bits.equal(seen[0]) for bits in seen)


def test_products_are_rounded_before_they_are_added():
    """Guards the reference: the entries are such that a fused multiply-add gives other bits."""
    one = Pull(ranks_of(1), Sizes((40,), 256, 4), torch.float32, Mode.weighted)
    fused = torch.zeros(40, one.hidden, dtype=torch.float64)
    for token, entries in enumerate(one.entries[0]):
        for j, (r, place) in enumerate(entries):
            if r >= 0:
                product = one.rows[0][place].double() * one.weights[0][token, j].double()
                fused[token] = (fused[token] + product).float().double()
    one.run()
    one.check()
    assert not torch.equal(fused.float(), one.out[0].cpu())


def test_ranks_that_take_no_part_give_nothing():
    """Ranks 1 and 3 do not launch: nobody waits for them, and their rows, all NaN, are not read."""
    for mode, width in ((Mode.rows, None), (Mode.grouped, 8), (Mode.weighted, 40)):
        ranks = Ranks(4)
        one = Pull(ranks, Sizes((20, 5, 9, 6), 528, width, biases=1), torch.float32, mode, alive=0b0101)
        for rank in (1, 3):  # their cards are not read: who reads rows all the same finds these, and they are NaN
            ranks.words(rank, "card", 8192).fill_(-1)
        one.run(only=(0, 2))
        one.check(only=(0, 2))
        assert (one.out[1].view(torch.uint8) == POISON).all()
        assert ranks.epochs() == [1, 0, 1, 0]


@by_config
def test_own_rows_are_read_where_they_are(dtype, mode):
    """Ranks 0 and 2 have rows in memory of their own, of which only peers use the copy in the heap."""
    one = Pull(ranks_of(3), Sizes((40, 13, 29), 2064, 8, biases=1), dtype, mode)
    for rank in (0, 2):
        numbers = torch.arange(one.sizes.num_places) + 555_555 + rank
        one.own[rank] = payload(numbers, one.hidden, dtype)
    fields = [one.fields(r, **({"source": one.ranks.on_device(one.own[r])} if r in one.own else {})) for r in range(3)]
    one.ranks.run(pull_spec.SPEC, fields, one.launch_sizes(), one.config)
    one.check()


# ---------------------------------------------------------------------- rows in this rank's memory


@pytest.mark.parametrize("by_place", [False, True])
@pytest.mark.parametrize("width", [5, 40])
def test_local_rows_meet_nobody(width, by_place):
    """As many tokens as this rank has received, known on the device only; one rank calls, the others do not."""
    ranks = ranks_of(3)
    one = Pull(ranks, Sizes((30, 0, 0), 528, width, num_places=20), torch.bfloat16, Mode.weighted)
    for entries in one.entries[0]:
        entries[:] = [(0, place) if r >= 0 else (-1, -1) for r, place in entries]
    rows = payload(torch.arange(20), one.hidden, torch.bfloat16)
    one.rows[0].copy_(rows)
    counts = ranks.on_device(torch.tensor([11, 0, 14]))  # 25 of 30
    more: dict[str, object] = {"local": ranks.on_device(rows), "rows_out": counts, "rows_in": counts, "num_tokens": 30}
    if by_place:
        weights = payload(torch.arange(20) + 5, 1, torch.float32)
        more |= {"weights": ranks.on_device(weights), "weight_by_place": 1}
        for token, entries in enumerate(one.entries[0]):
            for j, (_, place) in enumerate(entries):
                one.weights[0][token, j] = weights[place, 0]
    epochs = ranks.epochs()
    ranks.run(pull_spec.SPEC, [one.fields(0, **more), None, None], one.launch_sizes(), one.config)
    same_bits("local", one.out[0][:25], one.want(0)[:25])
    assert (one.out[0][25:].view(torch.uint8) == POISON).all(), "more rows than were received"
    assert ranks.epochs() == epochs


# ---------------------------------------------------------------------- weights


@dataclass
class Weights:
    """Weights that come home: what each rank holds, and where each token's slots find theirs."""

    pull: Pull
    top_k: int
    blocks: list[Block] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)
    out: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        ranks, sizes, pick = self.pull.ranks, self.pull.sizes, self.pull.pick
        R, K, P, by_rank = ranks.num_ranks, self.top_k, sizes.num_places, self.pull.by_rank
        for rank, T in enumerate(sizes.tokens):
            shape = (P, K) if by_rank else (P, 1)
            self.values.append(payload(torch.arange(P) + 1009 * rank, shape[1], torch.float32))
            self.blocks.append(ranks.block(rank, self.values[-1].numel() * 4))
            self.blocks[-1].tensor.copy_(self.values[-1].view(torch.uint8).flatten())
            table = torch.full((T, R + K + 1), -1, dtype=torch.int32)
            for token in range(T):
                for column in range(R if by_rank else K):
                    if pick.random() < 0.7:
                        at = column if by_rank else R + column
                        owner = 0 if by_rank else pick.randrange(R) << RANK_SHIFT
                        table[token, at] = owner | pick.randrange(P)
            self.places.append(table)
            self.out.append(ranks.poisoned(T, K, dtype=torch.float32))

    def fields(self, rank: int) -> dict[str, object]:
        up = self.pull.ranks.on_device
        table = up(self.places[rank])
        card = {0: 3, **offsets(self.pull.blocks[rank], self.blocks[rank])}
        more = {"places": table, "places_stride": table.shape[1], "top_k": self.top_k, "weights_out": self.out[rank]}
        return self.pull.fields(rank, card=card, **more)

    def want(self, rank: int) -> Tensor:
        R, K = self.pull.ranks.num_ranks, self.top_k
        table = torch.zeros(self.places[rank].shape[0], K)
        for token, line in enumerate(self.places[rank].tolist()):
            if self.pull.by_rank:
                for r in range(R):
                    if line[r] >= 0:
                        table[token] = table[token] + self.values[r][line[r]]
                continue
            for k, slot in enumerate(line[R : R + K]):
                if slot >= 0:
                    table[token, k] = self.values[slot >> RANK_SHIFT][slot & (1 << RANK_SHIFT) - 1, 0]
        return table


@pytest.mark.parametrize("top_k", [1, 8, 64])
@pytest.mark.parametrize("by_rank", [True, False])
def test_weights_come_home(by_rank, top_k):
    mode, width = (Mode.rows, None) if by_rank else (Mode.grouped, 6)
    one = Pull(ranks_of(3), Sizes((40, 0, 21), 4112, width, biases=1), torch.bfloat16, mode)
    weights = Weights(one, top_k)
    fields = [weights.fields(rank) for rank in range(3)]
    one.ranks.run(pull_spec.SPEC, fields, one.launch_sizes(), one.config)
    one.check()
    for rank in range(3):
        same_bits(f"weights of rank {rank}", weights.out[rank], weights.want(rank))


# ---------------------------------------------------------------------- stage


def stage(ranks, rank, source, block, counts, **more):
    """Params of `stage`; ``counts``: rows from each rank, rows of each expert."""
    return {
        "source": ranks.on_device(source),
        "to": block.address,
        "src_counts": ranks.on_device(torch.tensor(counts[0])),
        "expert_counts": ranks.on_device(torch.tensor(counts[1], dtype=torch.int32)),
        "num_local": len(counts[1]),
        "row_bytes": source.shape[1],
        **more,
    }


def random_rows(num_rows, row_bytes, seed):
    make = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num_rows, row_bytes), dtype=torch.uint8, generator=make)


@pytest.mark.parametrize("row_bytes", [16, 48, 2000, 14336])
def test_stage_copies_rows_below_the_counts(row_bytes):
    """Masked: the rows in use of each expert."""
    ranks = ranks_of(2)
    capacity, counts = 11, ([0, 11, 3, 7], [1, 0, 0, 10])
    sources = [random_rows(4 * capacity, row_bytes, rank) for rank in range(2)]
    blocks = [ranks.block(rank, sources[rank].numel()) for rank in range(2)]
    fields = [
        stage(ranks, rank, sources[rank], blocks[rank], ([5, 6], counts[rank]), capacity=capacity) for rank in range(2)
    ]
    ranks.run(stage_spec.SPEC, fields, (3, stage_spec.THREADS, 0))
    for rank in range(2):
        places = [e * capacity + i for e, count in enumerate(counts[rank]) for i in range(count)]
        check_rows(f"rank {rank}", blocks[rank], places, [sources[rank][place] for place in places], row_bytes)


@pytest.mark.parametrize("src_counts", [(7, 20, 3), (0, 5, 0), (9, 0, 9), (0, 0, 0), (600, 300, 401)])
def test_stage_copies_rows_that_peers_ask_for(src_counts):
    """By rank: all but the own ones; rows behind the last are not touched."""
    ranks = ranks_of(3)
    sources = [random_rows(sum(src_counts) + 4, 272, rank) for rank in range(3)]
    blocks = [ranks.block(rank, sources[rank].numel()) for rank in range(3)]
    fields = [stage(ranks, rank, sources[rank], blocks[rank], (src_counts, [1, 2])) for rank in range(3)]
    ranks.run(stage_spec.SPEC, fields, (2, stage_spec.THREADS, 0))
    for rank in range(3):
        own = range(sum(src_counts[:rank]), sum(src_counts[: rank + 1]))
        places = [place for place in range(sum(src_counts)) if place not in own]
        check_rows(f"rank {rank}", blocks[rank], places, [sources[rank][place] for place in places], 272)


def test_a_void_plan_stages_nothing():
    ranks = ranks_of(2)
    blocks = [ranks.block(rank, 8 * 64) for rank in range(2)]
    for capacity in (0, 4):
        fields = [
            stage(ranks, rank, random_rows(8, 64, 0), blocks[rank], ([-1, -1], [4, 4]), capacity=capacity)
            for rank in range(2)
        ]
        ranks.run(stage_spec.SPEC, fields, (1, stage_spec.THREADS, 0))
    for block in blocks:
        check_rows("a void plan", block, [], [], 64)
