"""The kernel combine_push alone, on virtual ranks: where rows are pushed to, and sums in rank order, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from support.virtual_decode import late_s
from support.virtual_pull import TYPES, by_type
from support.virtual_push import Push, Sizes, as_bytes, landed, push
from support.virtual_ranks import POISON, Ranks, ranks_of
from tokenferry.kernels.combine_push import spec as push_spec
from tokenferry.kernels.control_block import CAPACITY_WORD, MAX_LANDED, ROWS_WORD, START_WORD, Fault
from tokenferry.testing.compare import same_bits

SHORT_S, LATE_S = 0.2, 0.7
"""Deadlines of kernels that time out: because a peer does not launch; because it launches, but pushes no rows."""


# ---------------------------------------------------------------------- sums


@by_type
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
def test_every_type(num_ranks, dtype):
    i = TYPES.index(dtype)
    tokens = (40, 0, 13, 1, 29, 2, 0, 7)[:num_ranks]
    for j, row_bytes in enumerate((48, 2048, 4112)):
        push(Sizes(tokens, row_bytes, biases=(i + j) % 3, bits=(j,), seed=i), dtype)


@pytest.mark.parametrize("bits", [(0,), (1,), (3,), (3, 0, 1)], ids=str)
@pytest.mark.parametrize("row_bytes", [16, 48, 2048, 2064, 8208, 14336, 65536])
def test_rows_of_every_size(row_bytes, bits):
    """A piece has 2048 bytes where rows are summed, up to 8192 where they are pushed; each rank has its own units."""
    tokens = (30, 1, 17) if row_bytes < 10_000 else (9, 1, 6)
    for biases, whole in enumerate((0, 0.5, 1)):
        push(Sizes(tokens, row_bytes, biases, blocks=3, whole=whole, bits=bits))


@pytest.mark.parametrize("routing", ["own", "last", "nowhere"])
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_uneven_plans(num_ranks, routing):
    push(Sizes((40, 3, 0, 17, 50)[:num_ranks], 272, biases=1, blocks=3, bits=(1,), routing=routing))


def test_no_rank_has_tokens():
    push(Sizes((0, 0, 0), 272))


@pytest.mark.parametrize("late", [None, 0, 2])
@pytest.mark.parametrize(("blocks", "pushers"), [(1, 1), (2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3)])
def test_any_grid_and_a_late_rank(blocks, pushers, late):
    """A single block pushes, then sums; otherwise blocks do one or the other."""
    one = Push(ranks_of(3), Sizes((60, 31, 8), 4112, 1, blocks, pushers, bits=(1,)), torch.bfloat16)
    if late is not None:
        one.ranks.delay(late, 5)
    one.run()
    one.check()


def test_every_rank_has_a_grid_of_its_own():
    """Ranks may differ in the blocks that push, and in the blocks that announce their end."""
    one = Push(ranks_of(4), Sizes((30, 41, 8, 22), 2064, 1), torch.bfloat16)
    grids = ((1, 1), (4, 2), (2, 1), (3, 2))
    fields = [one.fields(rank, pushers=pushers) for rank, (_, pushers) in enumerate(grids)]
    one.ranks.call += 1
    for rank, (blocks, _) in enumerate(grids):
        only = [fields[r] if r == rank else None for r in range(4)]
        one.ranks.launch(push_spec.SPEC, only, (blocks, *one.launch_sizes()[1:]), one.config)
    one.ranks.wait()
    one.ranks.check_quiet()
    one.check()


@pytest.mark.parametrize("bits", [0, 2])
@pytest.mark.parametrize("row_bytes", [48, 6160, 14336])
def test_more_units_than_warps(row_bytes, bits):
    """A block has up to eleven warps that push: rings wrap around, and units end before the next ones start."""
    for blocks, whole in ((1, 1), (2, 0)):
        push(Sizes((150, 70), row_bytes, blocks=blocks, whole=whole, bits=(bits,)))


def test_the_flag_of_a_unit_is_set_after_its_last_row():
    """Enough warps to read all rows of a large unit at once, as soon as its flag is set."""
    push(Sizes((39, 0), 65536, blocks=4, whole=1, bits=(6,), routing="last"))


def test_as_many_units_as_there_are_flags():
    """Rank 0 has a row of each token on rank 1; the last unit may be short."""
    for tokens, bits in ((MAX_LANDED, 0), (MAX_LANDED + 1, 1)):
        assert push_spec.unit_bits(tokens) == bits
        push(Sizes((tokens, 3), 16, bits=(bits,), routing="last", blocks=3))


def test_units_have_flags_whatever_the_number_of_tokens():
    for tokens in (0, 1, 127, 128, 4096, 4097, 8192, 8193, 1 << 17, (1 << 20) + 1):
        assert -(-tokens >> push_spec.unit_bits(tokens)) <= MAX_LANDED


def test_no_more_tokens_are_whole_than_there_are():
    for tokens, pieces, adding in itertools.product((0, 1, 100, 5000), (1, 2, 7, 32), (1, 12, 66)):
        assert 0 <= push_spec.num_whole(tokens, pieces, adding) <= tokens


# ---------------------------------------------------------------------- rows that are fetched, weights


@pytest.mark.parametrize("fetched", [(1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("blocks", [1, 3])
def test_some_ranks_rows_are_fetched(blocks, fetched):
    """Peers fetch them where they lie; the other ranks push theirs, also to those ranks."""
    for row_bytes in (48, 4112):
        push(Sizes((40, 13, 29), row_bytes, biases=1, blocks=blocks, bits=(0, 2), fetched=fetched), torch.float16)


@pytest.mark.parametrize("top_k", [1, 8, 64])
def test_weights_are_returned(top_k):
    """Weights are returned to tokens without rows, too, and for tokens in many units."""
    for fetched, whole in (((), 0), ((), 1), ((2,), 0.5)):
        push(Sizes((40, 0, 21), 4112, biases=1, blocks=3, whole=whole, fetched=fetched, top_k=top_k))


# ---------------------------------------------------------------------- call after call


def test_other_rows_along_one_plan():
    """Memory and flags still hold the last run: a kernel that does not wait sums old rows."""
    one = Push(ranks_of(3), Sizes((40, 25, 33), 4112, blocks=3, bits=(2, 0)), torch.bfloat16)
    for seed in range(6):
        one.fill(seed)
        one.ranks.delay(seed % 3, 1)
        one.run()
        one.check()


def test_alternating_plans():
    """Units that only one plan has keep flags of two runs ago; also of a run with units of another size."""
    for seed in range(6):
        push(Sizes(((40, 7), (9, 31))[seed % 2], 528, bits=((0,), (3,), (1,))[seed % 3], blocks=3, seed=seed))


@pytest.mark.parametrize("wrong", [0, -1, "last", "next"])
def test_flags_with_another_epoch(wrong):
    """Only the epoch of this run means that rows have arrived."""
    ranks = ranks_of(3)
    epoch = ranks.epochs()[0]
    for rank in range(3):
        landed(ranks, rank).fill_({"last": epoch, "next": epoch + 2}.get(wrong, wrong))
    push(Sizes((40, 13, 29), 2064, bits=(1,), blocks=3))


def test_an_aborted_plan_pushes_nothing():
    ranks = ranks_of(2)
    one = Push(ranks, Sizes((9, 5), 64, top_k=2), torch.float32)
    epochs, void = ranks.epochs(), ranks.on_device(torch.tensor([-1, -1]))
    words = [landed(ranks, rank).clone() for rank in range(2)]
    ranks.run(push_spec.SPEC, one.all_fields(rows_out=void, rows_in=void), one.launch_sizes(), one.config)
    assert ranks.epochs() == epochs
    for rank in range(2):
        one.check_untouched(rank)
        assert (one.weights_out[rank].view(torch.uint8) == POISON).all()
        assert torch.equal(landed(ranks, rank), words[rank])


# ---------------------------------------------------------------------- lost ranks


@pytest.mark.parametrize("fetched", [(), (2,)], ids=str)
def test_ranks_that_take_no_part_contribute_nothing(fetched):
    """Ranks 1 and 3 do not launch: no rank waits for them or their rows, or pushes them any."""
    ranks = Ranks(4)
    one = Push(ranks, Sizes((20, 5, 9, 6), 528, biases=1, blocks=3, fetched=fetched), torch.float32, alive=0b0101)
    one.run()
    one.check()
    for rank in (1, 3):
        one.check_untouched(rank)
    assert ranks.epochs() == [1, 0, 1, 0]


def records_of(one: Push, fields: Sequence[dict[str, object] | None]):
    """Return the records of a run that fails; check that no rank has written around a block."""
    one.ranks.call += 1
    one.ranks.launch(push_spec.SPEC, fields, one.launch_sizes(), one.config)
    one.ranks.wait()
    for block in one.recv:
        block.cpu()
    return [one.ranks.record(rank) for rank in range(one.ranks.num_ranks)]


def test_a_rank_that_never_launches():
    one = Push(Ranks(4), Sizes((20, 9, 14, 5), 528, blocks=3), torch.bfloat16)
    fields = one.all_fields(timeout_s=late_s(4))
    records = records_of(one, [*fields[:2], None, fields[3]])
    assert records.pop(2) is None
    for record in records:
        assert record is not None
        assert record.call == one.ranks.call
        assert record.blamed == 2, record
        cause = record.word if record.code == Fault.peer_gave_up else record.code
        assert cause == Fault.late_handshake, record
    assert Fault.late_handshake in [record.code for record in records]
    for rank in range(4):
        one.check_untouched(rank)
    assert one.ranks.epochs() == [0] * 4


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_rank_whose_rows_do_not_come(rounds):
    """Rank 1 publishes its handshake, but does not push. It gets its own rows, and sees that it was given up."""
    one = Push(Ranks(2), Sizes((20, 9), 528, blocks=1), torch.bfloat16)
    for _ in range(rounds):
        one.run()
    late, given_up = records_of(one, [one.fields(0, timeout_s=LATE_S), one.fields(1, pushers=0)])
    assert late is not None
    assert (late.code, late.call, late.peer, late.blamed) == (Fault.late_rows, one.ranks.call, 1, 1)
    assert (late.seen, late.expected) == (rounds, rounds + 1)
    assert late.waited_ms >= LATE_S * 1000
    assert given_up is not None
    assert (given_up.code, given_up.peer, given_up.word, given_up.blamed) == (Fault.peer_gave_up, 0, Fault.late_rows, 1)
    same_bits("rank 1", one.out[1], one.want(1))
    assert one.ranks.epochs() == [rounds] * 2


@pytest.mark.parametrize("tokens", [(20, 9, 14), (20, 9, 0)])
def test_all_ranks_that_wait_for_rows_name_the_same_rank(tokens):
    """Blocks that push, and ranks without rows, wait for ranks that wait for rows: the latter record which is late."""
    one = Push(Ranks(3), Sizes(tokens, 528, blocks=3), torch.bfloat16)
    for record in records_of(
        one, [one.fields(r, timeout_s=max(LATE_S, late_s(3)), pushers=int(r != 1)) for r in range(3)]
    ):
        assert record is not None
        assert record.blamed == 1, record
        cause = record.word if record.code == Fault.peer_gave_up else record.code
        assert cause == Fault.late_rows, record


@pytest.mark.parametrize(("bits", "missing"), [(0, 0), (0, 21), (1, 6), (3, -1)])
def test_a_missing_unit(bits, missing):
    """All others arrive: no row of the missing unit is summed, and later units do not stand for it."""
    one = Push(Ranks(2), Sizes((70, 0), 528, blocks=1, bits=(bits,)), torch.float32)
    rows = one.plan.out[1][0]
    units = -(-rows >> bits)
    one.recv[0].tensor.copy_(as_bytes(one.rows[1]))
    missing %= units
    one.recv[0].tensor.view(rows, 528)[missing << bits : missing + 1 << bits] = POISON
    landed(one.ranks, 0)[1, :units] = 1
    landed(one.ranks, 0)[1, missing] = 0
    late, _ = records_of(one, [one.fields(0, timeout_s=LATE_S), one.fields(1, pushers=0)])
    assert late is not None
    assert (late.code, late.peer, late.seen, late.expected) == (Fault.late_rows, 1, 0, 1)
    got, want = one.out[0].view(torch.int32).cpu(), one.want(0).view(torch.int32)
    untouched = (one.out[0].view(torch.uint8) == POISON).all(dim=1).cpu()
    row = one.plan.table[0][:, 1]
    assert untouched[(row >= 0) & (row >> bits == missing)].all(), "rows that are missing were summed"
    assert torch.equal(got[~untouched], want[~untouched])


@pytest.mark.parametrize("more", [-1, 1])
def test_plans_of_different_dispatches(more):
    """Rank 1 has fewer rows for rank 0 than rank 0 expects: both see it; rank 2 may see it by its start word."""
    one = Push(Ranks(3), Sizes((20, 9, 14), 528, blocks=3), torch.bfloat16)
    expected = one.plan.out[1][0]
    fields = one.all_fields()
    fields[1]["rows_out"] = one.ranks.on_device(torch.tensor([expected + more, *one.plan.out[1][1:]]))
    causes = []
    for rank, record in enumerate(records_of(one, fields)):
        assert record is not None
        if record.code == Fault.peer_gave_up:
            causes.append(record.word)
            continue
        causes.append(record.code)
        assert (record.peer, record.word) == ((1, ROWS_WORD), (0, CAPACITY_WORD), (1, START_WORD))[rank], record
        if rank != 2:
            seen = (record.seen, record.expected)
            assert seen == ((expected + more, expected), (expected, expected + more))[rank], record
    assert causes == [Fault.mismatch] * 3
    for rank in (0, 1):
        assert (one.out[rank].view(torch.uint8) == POISON).all()
    for rank, src in itertools.product(range(3), range(2)):
        assert not landed(one.ranks, rank)[src].any(), "a rank that sees it pushes no rows"
    assert one.ranks.epochs() == [0] * 3
