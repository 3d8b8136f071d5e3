"""The kernels combine_pull and stage_input alone, on virtual ranks: sums in the documented order, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from support.row_bytes import check_rows
from support.virtual_pull import TYPES, Entries, Pull, Sizes, by_type
from support.virtual_ranks import POISON, Block, Ranks, offsets, ranks_of
from tokenferry.kernels.combine_pull import spec as pull_spec
from tokenferry.kernels.control_block import RANK_SHIFT
from tokenferry.kernels.stage_input import spec as stage_spec
from tokenferry.testing.cases import payload
from tokenferry.testing.compare import same_bits


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
