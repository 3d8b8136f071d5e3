"""The kernel `stage` alone, and beside a `pull` that waits for its parts, on virtual ranks."""

from __future__ import annotations

import pytest
import torch
from test_move import check_rows
from test_pull import Pull, Sizes
from virtual import MACHINE, POISON, offsets, ranks_of

from tokenferry.kernels.board import FIRST_OFFSET, Fault
from tokenferry.kernels.pull import spec as pull_spec
from tokenferry.kernels.pull.spec import Mode
from tokenferry.kernels.stage import spec as stage_spec

PARTS_WORD = FIRST_OFFSET + 2
MOST_PARTS = stage_spec.PARTS
SIZES = (2, stage_spec.THREADS, 0)


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
def test_rows_below_the_counts(row_bytes):
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
def test_rows_that_peers_ask_for(src_counts):
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


def test_a_void_plan():
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


# ---------------------------------------------------------------------- beside pull


class Beside:
    """A pull of three ranks' rows, of which some are staged meanwhile.

    Args:
        parts: In how many, of each rank; 0: its rows are there.
    """

    COUNTS = (24, 12, 13)
    """Rows that every rank has for each rank."""

    def __init__(self, parts):
        self.parts, self.ranks = parts, ranks_of(3)
        self.pull = one = Pull(self.ranks, Sizes((60, 33, 41), 4112, None, sum(self.COUNTS)), torch.bfloat16, Mode.rows)
        one.entries = [[self._token(rank) for _ in range(tokens)] for rank, tokens in enumerate(one.sizes.tokens)]
        one.rows = one._rows()
        self.sources = [rows.view(torch.uint8) for rows in one.rows]
        one.blocks = [one._block(rank) for rank in range(3)]
        for rank in range(3):
            if parts[rank]:
                one.blocks[rank].tensor.fill_(POISON)

    def _token(self, rank):
        start, count, pick = sum(self.COUNTS[:rank]), self.COUNTS[rank], self.pull.pick
        return [(r, start + pick.randrange(count)) if pick.random() < 0.7 else (-1, -1) for r in range(3)]

    def stages(self):
        """What to launch to stage rows."""
        return [
            {"parts": parts, **stage(self.ranks, rank, self.sources[rank], self.pull.blocks[rank], (self.COUNTS, [1]))}
            if parts
            else None
            for rank, parts in enumerate(self.parts)
        ]

    def pulls(self):
        """What to launch to pull them; a rank's own are read where they come from."""
        up, found = self.ranks.on_device, []
        for rank in range(3):
            found.append(
                self.pull.fields(
                    rank,
                    card={0: 3, **offsets(self.pull.blocks[rank]), PARTS_WORD: self.parts[rank]},
                    source=up(self.sources[rank]),
                    rows_out=up(torch.tensor(self.COUNTS)),
                    rows_in=up(torch.tensor([self.COUNTS[rank]] * 3)),
                )
            )
        return found

    def launch(self, spec, fields, streams=None):
        one = self.pull
        sizes, config = (SIZES, {}) if spec is stage_spec.SPEC else (one.launch_sizes(), one.config)
        self.ranks.launch(spec, fields, sizes, config, streams)


@pytest.mark.parametrize("parts", [(0, 1, 2), (MOST_PARTS, 3, 0), (MOST_PARTS, MOST_PARTS, MOST_PARTS)])
@pytest.mark.parametrize("first", ["stage", "pull"])
def test_rows_that_are_staged_meanwhile(parts, first):
    for _ in range(3):
        both = Beside(parts)
        ranks = both.ranks
        ranks.call += 1
        if first == "stage":
            both.launch(stage_spec.SPEC, both.stages())
            both.launch(pull_spec.SPEC, both.pulls())
        else:
            others = [MACHINE.stream() for _ in range(3)]
            MACHINE.sleep(others[1], 5)
            both.launch(pull_spec.SPEC, both.pulls())
            both.launch(stage_spec.SPEC, both.stages(), others)
        ranks.wait()
        ranks.check_quiet()
        both.pull.check()
        for rank in range(3):
            assert not ranks.words(rank, "copied", MOST_PARTS).any(), "the next stage would count on from there"


def test_rows_that_are_never_staged():
    """The ranks that need them give up, and say whose rows they are."""
    both = Beside((4, 4, 4))
    ranks, stages = both.ranks, both.stages()
    ranks.call += 1
    both.launch(stage_spec.SPEC, [*stages[:2], None])
    fields = both.pulls()
    for rank in (0, 1):  # the third waits for these two, and would be the first to be tired of it
        fields[rank]["timeout_s"] = 0.3
    both.launch(pull_spec.SPEC, fields)
    ranks.wait()
    records = [ranks.record(rank) for rank in range(3)]
    assert any(record is not None and record.code == Fault.late_rows for record in records), records
    for record in records:
        assert record is None or 2 in (record.peer, record.blamed), records


def pull_rows(rows, parts, told, wanted, timeout_s):
    """Rank 0 pulls some rows of rank 1, which has told so many of its parts; returns what rank 0 records."""
    ranks = ranks_of(2)
    one = Pull(ranks, Sizes((len(wanted), 1), 272, None, rows + 9), torch.bfloat16, Mode.rows)
    one.entries = [[[(-1, -1), (1, row)] for row in wanted], [[(0, 3), (-1, -1)]]]
    one.rows = one._rows()
    one.blocks = [one._block(rank) for rank in range(2)]
    counts = [[2, 7], [rows, 9]]  # of each rank for each
    ranks.words(0, "staged", told, torch.int64, first=MOST_PARTS).fill_((ranks.epochs()[0] + 1) << 32)
    fields = [
        one.fields(
            rank,
            card={0: 3, **offsets(one.blocks[rank]), PARTS_WORD: parts * rank},
            rows_out=ranks.on_device(torch.tensor(counts[rank])),
            rows_in=ranks.on_device(torch.tensor([counts[0][rank], counts[1][rank]])),
            timeout_s=timeout_s if rank == 0 else 30.0,
        )
        for rank in range(2)
    ]
    ranks.call += 1
    ranks.launch(pull_spec.SPEC, fields, one.launch_sizes(), one.config)
    ranks.wait()
    records = [ranks.record(rank) for rank in range(2)]
    if records == [None, None]:
        one.check()
    return records[0]


@pytest.mark.parametrize(("rows", "parts"), [(12, 16), (33, 16), (35, 3), (2, 1)])
def test_each_row_waits_for_its_part(rows, parts):
    """And for no other part: those of the parts that were told are enough, one row more is not."""
    for told in range(parts + 1):
        there = rows * told // parts
        if there:
            assert pull_rows(rows, parts, told, range(there), 30.0) is None, f"{told} of {parts} parts"
    for told in (0, parts // 2, parts - 1):
        late = pull_rows(rows, parts, told, [rows * told // parts], 0.05)
        assert late is not None, f"row {rows * told // parts} was read when {told} of {parts} parts had been told"
        assert (late.code, late.peer) == (Fault.late_rows, 1)
