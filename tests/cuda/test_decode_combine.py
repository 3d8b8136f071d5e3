"""The kernel decode_combine alone, on virtual ranks, along tables made by plain loops: sums bit for bit."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from test_decode_dispatch import SHORT_S, late_s

from support.decoding import uneven
from support.virtual_decode import (
    ALIVE,
    BOTH,
    COMBINE,
    ENCODINGS,
    EPOCH,
    PLACES,
    RECEIVE,
    SEND,
    THREADS,
    TOKENS,
    TYPES,
    Bed,
    Combine,
    all_at_once,
    decode_ranks,
    sends_and_receipts_at_once,
    the_third_waits_for_room,
)
from support.virtual_ranks import POISON, Ranks
from tokenferry.kernels.control_block import DISPATCH_WORD, MAX_RANKS, Fault
from tokenferry.kernels.decode_combine import spec as decode_combine_spec
from tokenferry.kernels.decode_words import CHUNK_COLUMNS
from tokenferry.testing.cases import ROUTINGS, Case
from tokenferry.testing.oracle import Oracle
from tokenferry.types import MoeShape

by_numerics = pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])


def check_call(case: Case, *, fast: bool = False, encoding: str = "same", max_tokens: int = 0) -> Combine:
    """Make one call twice, for both halves of the workspaces, and check it."""
    bed = Bed.of(case, max_tokens)
    for seed in (case.seed, case.seed + 1):
        one = Combine(bed, replace(case, seed=seed), fast=fast, encoding=encoding)
        one.run()
        one.check()
        bed.check_clear()
    return one


@by_numerics
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing(routing, num_ranks, fast):
    top_k = (4, 3, 8, 6, 2, 5, 7, 9)[ROUTINGS.index(routing)]
    check_call(
        Case((6, 0, 11, 1, 4, 2, 9, 33)[:num_ranks], 5 * num_ranks, top_k, routing=routing, hidden=24), fast=fast
    )


@by_numerics
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 7, 8, 11, 16, 31, 32, 33, 48, 64])
def test_every_number_of_choices(top_k, fast):
    """Slots are read four at a time, or two; those beyond 32 are another word of a lane."""
    for routing in ("repeated", "half_dropped"):
        check_call(Case((7, 5), 2 * 37, top_k, routing=routing), fast=fast)


@by_numerics
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("num_ranks", [3, 5])
def test_rows_of_every_size(num_ranks, dtype, fast):
    """Chunks have 512 columns: less than one, its end, and a bit more."""
    for hidden in (8, 24, 504, 512, 520, 1160):
        check_call(Case((2, 0, 3, 1, 5)[:num_ranks], 2 * num_ranks, 3, hidden=hidden, dtype=dtype), fast=fast)


@by_numerics
@pytest.mark.parametrize("encoding", ENCODINGS[1:])
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("num_ranks", [2, 5])
def test_every_encoding(num_ranks, dtype, encoding, fast):
    """Groups of 128 columns have magnitudes of their own; ends of groups and of chunks."""
    for hidden in (16, 144, 528, 640):
        case = Case((1, 2, 3, 0, 2)[:num_ranks], 3 * num_ranks, 3, hidden=hidden, dtype=dtype, routing="repeated")
        bed = Bed.of(case)
        sent, ys = case.inputs(), [uneven(y) for y in Combine(bed, case).ys]
        if dtype == torch.float16:  # or sums would be infinite
            sent, ys = tuple(replace(s, topk_weights=s.topk_weights / 256) for s in sent), [y / 256 for y in ys]
        one = Combine(bed, case, fast=fast, encoding=encoding, sent=sent, ys=ys)
        one.run()
        one.check()
        bed.check_clear()


@by_numerics
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_wide_rows(encoding, fast):
    tokens, top_k = ((1, 1), 1) if encoding == "logfmt10" else ((2, 3), 2)  # the oracle looks at 512 codes a number
    check_call(Case(tokens, 4, top_k, hidden=7168), encoding=encoding, fast=fast)


@by_numerics
def test_every_kind_of_index(fast):
    for idx_dtype in (torch.int32, torch.int64):
        check_call(Case((9, 0, 4), 6, 4, idx_dtype=idx_dtype, routing="half_dropped"), fast=fast)


@by_numerics
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
@pytest.mark.parametrize(("experts", "top_k"), [(4096, 8), (4096, 64), (255, 33)])
def test_many_experts(experts, top_k, num_ranks, fast):
    experts -= experts % num_ranks
    check_call(Case((3, 5, 0, 1, 2)[:num_ranks], experts, top_k, hidden=8), fast=fast)


@by_numerics
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_room_for_many_tokens(num_ranks, fast):
    """M = 4096, of which ranks bring few: the places of the others are poison in the table."""
    check_call(Case((70, 1, 0, 40, 3)[:num_ranks], 2 * num_ranks, 3, hidden=8), fast=fast, max_tokens=4096)


@by_numerics
@pytest.mark.parametrize("num_ranks", [5])
def test_most_tokens(num_ranks, fast):
    case = Case((4096, 0, 500, 1, 33), 2 * num_ranks, 3, hidden=8, routing="repeated")
    bed = Bed(Ranks(num_ranks, 200 << 20), case.shape, item_bytes=2)
    one = Combine(bed, case, fast=fast)
    one.run()
    one.check()
    bed.check_clear()


@by_numerics
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_nobody_has_tokens(num_ranks, fast):
    check_call(Case((0,) * num_ranks, 2 * num_ranks, 2), fast=fast)


@by_numerics
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_that_look_like_no_packet(encoding, fast):
    """16 bytes of ones are the sentinel: such rows are returned all the same, as NaN."""
    case = Case((5, 4), 4, 3, hidden=528)
    bed = Bed.of(case)
    ys = [y.clone() for y in Combine(bed, case).ys]
    spoilt = [row.place for row in Oracle(case.inputs(), 4, "masked", capacity=10).rows(0)[:3]]
    ys[0][spoilt] = torch.tensor(-1, dtype=torch.int16).view(torch.bfloat16)
    one = Combine(bed, case, fast=fast, encoding=encoding, ys=ys)
    one.run()
    bed.check_clear()
    for rank in range(2):
        want = one.oracle.decode_combine(rank, ys, fast=fast)
        assert one.sums(rank).isnan().equal(want.isnan())
        assert not want.isnan().all()


def test_codes_that_look_like_no_packet():
    """Ten bits of ones are the code of a group's most negative number: thirteen in a row fill a packet with ones."""
    case = Case((2, 2), 2, 1, hidden=256)
    bed = Bed.of(case)
    ys = [torch.full_like(y, 0.5) for y in Combine(bed, case).ys]
    for y in ys:
        y[:, 16:48] = -3.0
        y[:, 130] = -3.0
    one = Combine(bed, case, encoding="logfmt10", ys=ys)
    one.run()
    for rank in range(2):
        want = one.oracle.decode_combine(rank, ys, encoding="logfmt10").float()
        far = (one.sums(rank).float() - want).abs() > 0.01 * want.abs()  # codes are half a percent apart
        assert not far.any(), one.sums(rank)[far]
    bed.check_clear()


@by_numerics
@pytest.mark.parametrize("blocks", [2, 9])
def test_any_number_of_blocks(blocks, fast):
    case = Case((21, 4), 6, 4, hidden=520)
    bed = Bed.of(case)
    for seed in range(3):
        one = Combine(bed, replace(case, seed=seed), fast=fast)
        one.begin(BOTH)
        sizes = (blocks, 32 if blocks == 2 else THREADS, 0)
        bed.ranks.run(decode_combine_spec.SPEC, [one.fields(rank) for rank in range(2)], sizes, one.config)
        one.check()
        bed.check_clear()


# ---------------------------------------------------------------------- call after call


def varied(num_ranks: int, seed: int) -> Case:
    """Return another case of the same sizes."""
    tokens = tuple((7 * seed + 5 * rank) % 13 for rank in range(num_ranks))
    return Case(tokens, 4 * num_ranks, 5, hidden=264, routing=ROUTINGS[seed % 3], seed=seed)


def bed_for(num_ranks: int) -> Bed:
    return Bed(decode_ranks(num_ranks), MoeShape(4 * num_ranks, 5, 264, 12))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_many_calls_at_once(num_ranks):
    """Twelve calls, of every kind, on every stream before the first has ended."""
    bed = bed_for(num_ranks)
    calls = [
        Combine(bed, varied(num_ranks, seed), fast=seed % 2 == 1, encoding=("same", "same", "fp8")[seed % 3])
        for seed in range(12)
    ]
    all_at_once(calls)


@by_numerics
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_sends_before_their_receipts(num_ranks, fast):
    """Rows may be overwritten once they are sent; at most two sends are not yet received."""
    bed = bed_for(num_ranks)
    calls = [Combine(bed, varied(num_ranks, seed), fast=fast, hook=True) for seed in range(9)]
    for i, one in enumerate(calls):
        one.run(SEND)
        for rank in range(num_ranks):
            assert (one.out[rank].cpu() == POISON).all(), "a launch that only sends has received"
            one.y_there[rank].fill_(torch.nan)
        if i:
            calls[i - 1].run(RECEIVE)
            calls[i - 1].check()
    calls[-1].run(RECEIVE)
    calls[-1].check()
    bed.check_clear()


def test_sends_and_receipts_at_once():
    """The same without waiting in between, with calls that do both."""
    bed = bed_for(3)
    calls = [Combine(bed, varied(3, seed), fast=seed % 2 == 0, hook=seed % 4 != 3) for seed in range(14)]
    sends_and_receipts_at_once(calls)


@pytest.mark.parametrize("before", [-3, -2])
def test_epochs_wrap_around(before):
    """0 is the epoch of a dispatch, and of a combine, like others; and one behind it waits for room like others."""
    bed = Bed(Ranks(2), MoeShape(8, 5, 264, 12))
    bed.start_at(before)
    calls = [Combine(bed, varied(2, seed), hook=True) for seed in range(3)]
    for i, one in enumerate(calls):
        for table in one._tables:
            table[EPOCH] = before + 1 + i
    the_third_waits_for_room(*calls)


@pytest.mark.parametrize("late", [0, 2])
def test_a_late_rank_is_waited_for_and_the_time_counted(late):
    case = varied(3, 4)
    bed = Bed.of(case)
    one = Combine(bed, case)
    bed.ranks.delay(late, 40)
    one.run()
    one.check()
    for rank in range(3):
        waited = one.wait_ns[rank].tolist()
        assert waited[rank] == 0, "a rank waited for itself"
        if rank != late:
            assert waited[late] > 10_000_000, waited


def test_a_void_plan_brings_nothing_home():
    """An aborted dispatch leaves its mark in the table; nothing is sent, nothing is written."""
    case = varied(2, 4)
    bed = Bed.of(case)
    one = Combine(bed, case, hook=True)
    for table in one._tables:
        table[ALIVE] = 0
    before = [block.cpu().clone() for block in bed.blocks]
    for phases in (BOTH, SEND, RECEIVE):
        one.launch(phases)
        bed.ranks.wait()
        bed.ranks.check_quiet()
    assert [block.cpu().equal(was) for block, was in zip(bed.blocks, before, strict=True)] == [True, True]
    assert all((out.cpu() == POISON).all() for out in one.out)
    assert bed.ranks.words(0, "sends", 2)[COMBINE] == bed.sends[COMBINE] - 2


# ---------------------------------------------------------------------- late and lost ranks


def fresh(num_ranks: int, case: Case, calls: int, *, fast: bool = False, hook: bool = False) -> tuple[Bed, Combine]:
    """Return new ranks that have made some calls, and another call."""
    bed = Bed(Ranks(num_ranks), case.shape)
    for seed in range(calls):
        Combine(bed, replace(case, seed=seed)).run()
    bed.ranks.call += 1
    return bed, Combine(bed, replace(case, seed=calls), fast=fast, hook=hook)


@by_numerics
@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_rank_that_never_sends(calls, fast):
    """The first block to find it records it: that which compares signatures, or one that waits for rows."""
    bed, one = fresh(2, Case((4, 3), 4, 3), calls, fast=fast)
    one.launch(only=(0,), timeout_s=SHORT_S)
    bed.ranks.wait()
    record = bed.ranks.record(0)
    assert record is not None
    assert (record.call, record.peer, record.blamed) == (bed.ranks.call, 1, 1)
    seen = {Fault.late_handshake: max(calls - 1, 0), Fault.late_rows: 0}[Fault(record.code)]
    assert (record.seen, record.expected) == (seen, calls + 1)
    assert record.waited_ms >= SHORT_S * 1000
    assert bed.ranks.failed() == [record.code, 0]
    assert int(bed.ranks.words(1, "gave_up", 8, torch.int64)[0]) == record.code << 32 | 1


def lose_packet(bed: Bed, one: Combine, at: int, row: int) -> None:
    """Take the first packet of a row away before it is received."""
    packets = decode_combine_spec.packets_of_chunk(one.case.dtype.itemsize, decode_combine_spec.SAME)
    chunks = -(-one.case.hidden // CHUNK_COLUMNS)
    start = bed.workspaces[at].answers_at + (one.epoch & 1) * bed.sizes.answers + row * chunks * packets * 16
    there = bed.blocks[at].tensor[start : start + 16]
    assert (there != 0xFF).any(), "there is no packet"
    there.fill_(0xFF)


def test_rows_that_never_come():
    """The signature is here, a packet is not."""
    bed, one = fresh(2, Case((4, 3), 4, 2, routing="all_to_expert_0"), 2, hook=True)
    one.launch(SEND)
    bed.ranks.wait()
    lose_packet(bed, one, at=1, row=2 * 2)  # the third token's first slot
    one.launch(RECEIVE, only=(1,), timeout_s=SHORT_S)
    bed.ranks.wait()
    record = bed.ranks.record(1)
    assert record is not None
    assert (record.code, record.peer, record.blamed) == (Fault.late_rows, 0, 0)
    assert (record.seen, record.expected) == (0, 3)


@by_numerics
@pytest.mark.parametrize("num_ranks", [2, 5])
@pytest.mark.parametrize("routing", ["even", "half_dropped"])
def test_a_late_rank_is_masked(routing, num_ranks, fast):
    """The others go on without it, and the sums are those without its experts."""
    case = Case((6, 5, 7, 0, 1)[:num_ranks], 2 * num_ranks, 4, hidden=264, routing=routing)
    bed, one = fresh(num_ranks, case, 1, fast=fast)
    there = [rank for rank in range(num_ranks) if rank != 1]
    one.launch(only=there, mask_late=1, timeout_s=late_s(num_ranks))
    bed.ranks.wait()
    bed.ranks.check_quiet()
    check_without(one, gone=1)
    after = Combine(bed, replace(case, seed=9), fast=fast, hook=True)
    after.launch(only=there, mask_late=1)
    bed.ranks.wait()
    bed.ranks.check_quiet()
    check_without(after, gone=1)
    tickets = [after.tickets[rank].tolist() for rank in there]
    assert tickets == [[after.epoch, (1 << num_ranks) - 1 & ~2]] * (num_ranks - 1)


def check_without(one: Combine, gone: int) -> None:
    """Expect the sums without the experts of a masked rank."""
    check_sums_without(one, gone)
    for rank in range(one.case.ranks):
        if rank != gone:
            assert int(one.ranks.words(rank, "masked")) == 1 << gone
            masked = one.bed.masked[rank].tolist()[: one.case.ranks]
            assert masked == [int(peer == gone) for peer in range(one.case.ranks)]


def check_sums_without(one: Combine, gone: int) -> None:
    case, local = one.case, one.num_local
    sent = []
    for had in one.inputs:
        away = had.topk_idx // local == gone
        sent.append(replace(had, topk_idx=torch.where(away, -1, had.topk_idx)))
    expected = Oracle(sent, case.experts, "masked", capacity=one.room)
    for rank in range(case.ranks):
        if rank == gone:
            continue
        # Rows lie where they lay: only what is added up is less.
        expected._places = one.oracle._places
        want = expected.decode_combine(rank, one.ys, fast=one.fast)
        got = one.sums(rank)
        assert got.equal(want), f"{one} rank {rank}: {(got != want).nonzero()[:5].tolist()}"


@by_numerics
def test_a_rank_that_is_lost_while_it_sends(fast):
    """Its packets are cleared, though they are not summed: two calls later they would pass for another rank's."""
    bed, one = fresh(2, Case((8, 8), 4, 2, hidden=64), 1, fast=fast)
    places = one._tables[1][PLACES:].view(2, bed.shape.max_tokens, 2)
    places[:, :4] = -1  # it has sent the later half of each rank's tokens
    one.launch(SEND, only=(1,))
    bed.ranks.wait()
    bed.sends[COMBINE] -= 1
    one.launch(only=(0,), mask_late=1, timeout_s=SHORT_S)
    bed.ranks.wait()
    bed.ranks.check_quiet()
    assert int(bed.ranks.words(0, "masked")) == 2
    bed.check_clear(only=(0,))


def test_a_masked_rank_that_gives_up():
    """A CUDA graph from before it was masked knows it as one that takes part, and goes on all the same."""
    bed, one = fresh(3, Case((5, 4, 3), 6, 2, hidden=64), 1)
    for rank in (0, 1):
        bed.ranks.words(rank, "masked").fill_(4)
        bed.ranks.words(rank, "gave_up", 1, torch.int64, first=2).fill_(1 << 32)  # of rank 2, waiting for rank 0
    one.begin(BOTH)
    bed.ranks.delay(1, 100)
    bed.ranks.launch(decode_combine_spec.SPEC, [one.fields(0), one.fields(1), None], (3, THREADS, 0), one.config)
    bed.ranks.wait()
    bed.ranks.check_quiet()
    check_sums_without(one, gone=2)


@pytest.mark.parametrize("calls", [1, 2])
def test_what_has_not_come_is_not_acknowledged(calls):
    """Peers would overwrite it before it is received."""
    bed, one = fresh(2, Case((3, 3), 4, 2, hidden=64), calls)
    one.launch(only=(0,), timeout_s=SHORT_S)
    bed.ranks.wait()
    acks = bed.ranks.words(1, "acks", 2, first=2 * COMBINE * MAX_RANKS).tolist()
    assert max(acks) < one.epoch


@by_numerics
def test_a_rank_that_the_dispatch_left_out(fast):
    """It is not waited for, and nothing is sent to it, though it is not masked any more."""
    case = Case((6, 5, 7), 6, 4, hidden=264, routing="half_dropped")
    bed, one = fresh(3, case, 1, fast=fast, hook=True)
    for rank in (0, 2):
        one._tables[rank][ALIVE] = 5
        one._tables[rank][TOKENS + 1] = 0
    before = bed.blocks[1].cpu().clone()
    one.launch(only=(0, 2), timeout_s=late_s(3))
    bed.ranks.wait()
    bed.ranks.check_quiet()
    check_sums_without(one, gone=1)
    assert [one.tickets[rank].tolist() for rank in (0, 2)] == [[one.epoch, 5]] * 2
    assert bed.blocks[1].cpu().equal(before), "something was sent to it"
    assert not any(int(bed.ranks.words(rank, "masked")) for rank in range(3))


def test_a_late_rank_is_waited_for_once():
    """A token with many rows on it does not wait anew for every few of them."""
    case = Case((3, 0), 64, 32, routing="even")
    bed, one = fresh(2, case, 0)
    start = time.monotonic()
    one.launch(only=(0,), mask_late=1, timeout_s=0.4)
    bed.ranks.wait()
    bed.ranks.check_quiet()
    check_without(one, gone=1)
    assert time.monotonic() - start < 1.2


@pytest.mark.parametrize("word", [0, 1, 13, DISPATCH_WORD])
def test_a_peer_that_calls_something_else(word):
    """Or combines the rows of another dispatch."""
    bed, one = fresh(2, Case((4, 3), 4, 2), 1)
    handshakes = [{0: 7, 1: 0}, {0: 7, 1: 0, word: 99}]
    one.begin(BOTH)
    if word == DISPATCH_WORD:
        handshakes[0][word] = int(one._tables[0][EPOCH])
        one._tables[1][EPOCH] = 99
    fields = [one.fields(rank, handshake=handshakes[rank]) for rank in range(2)]
    bed.ranks.launch(decode_combine_spec.SPEC, fields, (3, THREADS, 0), one.config)
    bed.ranks.wait()
    records = [bed.ranks.record(rank) for rank in range(2)]
    for rank, record in enumerate(records):
        assert record is not None
        if record.code == Fault.peer_gave_up:
            assert (record.peer, record.word) == (1 - rank, Fault.mismatch)
            continue
        assert (record.code, record.peer, record.word) == (Fault.mismatch, 1 - rank, word)
        assert (record.seen, record.expected) == (handshakes[1 - rank].get(word, 0), handshakes[rank].get(word, 0))
