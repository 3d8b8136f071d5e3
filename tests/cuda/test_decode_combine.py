"""The kernel `decode_combine` alone, on virtual ranks, along tables made by plain loops: sums bit for bit."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from support.decoding import uneven
from support.not_finite import any_bits, spoil
from support.virtual_decode import (
    ALIVE,
    BOTH,
    COMBINE,
    ENCODINGS,
    EPOCH,
    PLACES,
    RECEIVE,
    SEND,
    SHORT_S,
    THREADS,
    TOKENS,
    TYPES,
    CombineCall,
    VirtualGroup,
    decode_ranks,
    late_s,
    launch_back_to_back,
    sends_and_receives_back_to_back,
    third_send_waits_for_acks,
)
from support.virtual_ranks import POISON, Ranks
from tokenferry.kernels.control_block import DISPATCH_WORD, MAX_RANKS, Fault
from tokenferry.kernels.decode_combine import spec as decode_combine_spec
from tokenferry.testing.cases import ROUTINGS, Case
from tokenferry.testing.oracle import Oracle
from tokenferry.types import MoeShape

by_numerics = pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])


def check_combine(case: Case, *, fast: bool = False, encoding: str = "same", max_tokens: int = 0) -> CombineCall:
    """Check two calls without faults, one for each epoch parity; return the last."""
    group = VirtualGroup.of(case, max_tokens)
    for seed in (case.seed, case.seed + 1):
        call = CombineCall(group, replace(case, seed=seed), fast=fast, encoding=encoding)
        call.run()
        call.check()
        group.check_clear()
    return call


@by_numerics
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing(routing, num_ranks, fast):
    top_k = (4, 3, 8, 6, 2, 5, 7, 9)[ROUTINGS.index(routing)]
    check_combine(
        Case((6, 0, 11, 1, 4, 2, 9, 33)[:num_ranks], 5 * num_ranks, top_k, routing=routing, hidden=24), fast=fast
    )


@by_numerics
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 7, 8, 11, 16, 31, 32, 33, 48, 64])
def test_every_number_of_choices(top_k, fast):
    """Rows are read four or two at a time; slots from 32 on are a second word of each lane."""
    for routing in ("repeated", "half_dropped"):
        check_combine(Case((7, 5), 2 * 37, top_k, routing=routing), fast=fast)


@by_numerics
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("num_ranks", [3, 5])
def test_rows_of_every_size(num_ranks, dtype, fast):
    """Chunks have 512 columns: rows of less than one, of one, and of more."""
    for hidden in (8, 24, 504, 512, 520, 1160):
        check_combine(Case((2, 0, 3, 1, 5)[:num_ranks], 2 * num_ranks, 3, hidden=hidden, dtype=dtype), fast=fast)


@by_numerics
@pytest.mark.parametrize("encoding", ENCODINGS[1:])
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("num_ranks", [2, 5])
def test_every_encoding(num_ranks, dtype, encoding, fast):
    """Groups of 128 columns differ in magnitude; row sizes at the ends of groups and chunks."""
    for hidden in (16, 144, 528, 640):
        case = Case((1, 2, 3, 0, 2)[:num_ranks], 3 * num_ranks, 3, hidden=hidden, dtype=dtype, routing="repeated")
        group = VirtualGroup.of(case)
        sent, ys = case.inputs(), [uneven(y) for y in CombineCall(group, case).ys]
        if dtype == torch.float16:  # or sums would be infinite
            sent, ys = tuple(replace(s, topk_weights=s.topk_weights / 256) for s in sent), [y / 256 for y in ys]
        call = CombineCall(group, case, fast=fast, encoding=encoding, sent=sent, ys=ys)
        call.run()
        call.check()
        group.check_clear()


@by_numerics
@pytest.mark.parametrize("encoding", ENCODINGS[1:])
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])
def test_what_is_not_finite(dtype, encoding, fast):
    """Infinities and NaNs become NaN at their places; the columns beside them do not change."""
    case = Case((3, 4), 4, 2, hidden=640, dtype=dtype)
    group = VirtualGroup.of(case)
    ys = [spoil(y / 64) for y in CombineCall(group, case).ys]
    assert not any(y.isfinite().all(dim=1).any() for y in ys)
    many = [[any_bits(y, seed=i) for i, y in enumerate(ys)]] if encoding == "fp8" else []  # whose sums are infinite
    for rows in (ys, *many):
        call = CombineCall(group, case, fast=fast, encoding=encoding, ys=rows)
        call.run()
        call.check()
        group.check_clear()
        assert all(call.sums(rank).isnan().any() for rank in range(2))


@by_numerics
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_wide_rows(encoding, fast):
    tokens, top_k = ((1, 1), 1) if encoding == "logfmt10" else ((2, 3), 2)  # the oracle tries 512 codes for each number
    check_combine(Case(tokens, 4, top_k, hidden=7168), encoding=encoding, fast=fast)


@by_numerics
def test_every_kind_of_index(fast):
    for idx_dtype in (torch.int32, torch.int64):
        check_combine(Case((9, 0, 4), 6, 4, idx_dtype=idx_dtype, routing="half_dropped"), fast=fast)


@by_numerics
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
@pytest.mark.parametrize(("experts", "top_k"), [(4096, 8), (4096, 64), (255, 33)])
def test_many_experts(experts, top_k, num_ranks, fast):
    experts -= experts % num_ranks
    check_combine(Case((3, 5, 0, 1, 2)[:num_ranks], experts, top_k, hidden=8), fast=fast)


@by_numerics
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_few_of_many_tokens(num_ranks, fast):
    """M = 4096, and ranks send few tokens: the places of the others are poison in the table."""
    check_combine(Case((70, 1, 0, 40, 3)[:num_ranks], 2 * num_ranks, 3, hidden=8), fast=fast, max_tokens=4096)


@by_numerics
@pytest.mark.parametrize("num_ranks", [5])
def test_most_tokens(num_ranks, fast):
    case = Case((4096, 0, 500, 1, 33), 2 * num_ranks, 3, hidden=8, routing="repeated")
    group = VirtualGroup(Ranks(num_ranks, 200 << 20), case.shape, item_bytes=2)
    call = CombineCall(group, case, fast=fast)
    call.run()
    call.check()
    group.check_clear()


@by_numerics
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_no_rank_has_tokens(num_ranks, fast):
    check_combine(Case((0,) * num_ranks, 2 * num_ranks, 2), fast=fast)


@by_numerics
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_equal_to_the_sentinel(encoding, fast):
    """16 bytes of ones mark an empty packet: such rows still arrive, as NaN."""
    case = Case((5, 4), 4, 3, hidden=528)
    group = VirtualGroup.of(case)
    ys = [y.clone() for y in CombineCall(group, case).ys]
    spoilt = [row.place for row in Oracle(case.inputs(), 4, "masked", capacity=10).rows(0)[:3]]
    ys[0][spoilt] = torch.tensor(-1, dtype=torch.int16).view(torch.bfloat16)
    call = CombineCall(group, case, fast=fast, encoding=encoding, ys=ys)
    call.run()
    group.check_clear()
    for rank in range(2):
        want = call.oracle.decode_combine(rank, ys, fast=fast)
        assert call.sums(rank).isnan().equal(want.isnan())
        assert not want.isnan().all()


def test_codes_equal_to_the_sentinel():
    """Ten ones are the code of a group's most negative number: thirteen of them fill a packet with ones."""
    case = Case((2, 2), 2, 1, hidden=256)
    group = VirtualGroup.of(case)
    ys = [torch.full_like(y, 0.5) for y in CombineCall(group, case).ys]
    for y in ys:
        y[:, 16:48] = -3.0
        y[:, 130] = -3.0
    call = CombineCall(group, case, encoding="logfmt10", ys=ys)
    call.run()
    for rank in range(2):
        want = call.oracle.decode_combine(rank, ys, encoding="logfmt10").float()
        far = (call.sums(rank).float() - want).abs() > 0.01 * want.abs()  # codes are half a percent apart
        assert not far.any(), call.sums(rank)[far]
    group.check_clear()


@by_numerics
@pytest.mark.parametrize("blocks", [2, 9])
def test_any_number_of_blocks(blocks, fast):
    case = Case((21, 4), 6, 4, hidden=520)
    group = VirtualGroup.of(case)
    for seed in range(3):
        call = CombineCall(group, replace(case, seed=seed), fast=fast)
        call.begin(BOTH)
        sizes = (blocks, 32 if blocks == 2 else THREADS, 0)
        group.ranks.run(decode_combine_spec.SPEC, [call.fields(rank) for rank in range(2)], sizes, call.config)
        call.check()
        group.check_clear()


# ---------------------------------------------------------------------- call after call


def varied(num_ranks: int, seed: int) -> Case:
    """Return another case of the same sizes."""
    tokens = tuple((7 * seed + 5 * rank) % 13 for rank in range(num_ranks))
    return Case(tokens, 4 * num_ranks, 5, hidden=264, routing=ROUTINGS[seed % 3], seed=seed)


def group_for(num_ranks: int) -> VirtualGroup:
    return VirtualGroup(decode_ranks(num_ranks), MoeShape(4 * num_ranks, 5, 264, 12))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_many_calls_at_once(num_ranks):
    """Twelve calls with different numerics and encodings are queued before the first has ended."""
    group = group_for(num_ranks)
    calls = [
        CombineCall(group, varied(num_ranks, seed), fast=seed % 2 == 1, encoding=("same", "same", "fp8")[seed % 3])
        for seed in range(12)
    ]
    launch_back_to_back(calls)


@by_numerics
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_sends_before_their_receives(num_ranks, fast):
    """Rows may be overwritten once they are sent; at most two sends are not yet received."""
    group = group_for(num_ranks)
    calls = [CombineCall(group, varied(num_ranks, seed), fast=fast, hook=True) for seed in range(9)]
    for i, call in enumerate(calls):
        call.run(SEND)
        for rank in range(num_ranks):
            assert (call.out[rank].cpu() == POISON).all(), "a launch that only sends has received"
            call.y_on_device[rank].fill_(torch.nan)
        if i:
            calls[i - 1].run(RECEIVE)
            calls[i - 1].check()
    calls[-1].run(RECEIVE)
    calls[-1].check()
    group.check_clear()


def test_sends_and_receives_back_to_back():
    """The same without waiting in between, mixed with launches that do both."""
    group = group_for(3)
    calls = [CombineCall(group, varied(3, seed), fast=seed % 2 == 0, hook=seed % 4 != 3) for seed in range(14)]
    sends_and_receives_back_to_back(calls)


@pytest.mark.parametrize("before", [-3, -2])
def test_epochs_wrap_around(before):
    """0 is an epoch like others, of a dispatch and of a combine, and the sends after it wait for acknowledgements."""
    group = VirtualGroup(Ranks(2), MoeShape(8, 5, 264, 12))
    group.start_after(before)
    calls = [CombineCall(group, varied(2, seed), hook=True) for seed in range(3)]
    for i, call in enumerate(calls):
        for table in call._tables:
            table[EPOCH] = before + 1 + i
    third_send_waits_for_acks(*calls)


@pytest.mark.parametrize("late", [0, 2])
def test_a_late_rank_is_waited_for_and_the_time_counted(late):
    case = varied(3, 4)
    group = VirtualGroup.of(case)
    call = CombineCall(group, case)
    group.ranks.delay(late, 40)
    call.run()
    call.check()
    for rank in range(3):
        waited = call.wait_ns[rank].tolist()
        assert waited[rank] == 0, "a rank waited for itself"
        if rank != late:
            assert waited[late] > 10_000_000, waited


def test_the_combine_of_an_aborted_dispatch_is_a_no_op():
    """The table marks the dispatch as aborted: nothing is sent, and nothing is written."""
    case = varied(2, 4)
    group = VirtualGroup.of(case)
    call = CombineCall(group, case, hook=True)
    for table in call._tables:
        table[ALIVE] = 0
    before = [block.cpu().clone() for block in group.blocks]
    for phases in (BOTH, SEND, RECEIVE):
        call.launch(phases)
        group.ranks.wait()
        group.ranks.check_quiet()
    assert [block.cpu().equal(was) for block, was in zip(group.blocks, before, strict=True)] == [True, True]
    assert all((out.cpu() == POISON).all() for out in call.out)
    assert group.ranks.words(0, "sends", 2)[COMBINE] == group.sends[COMBINE] - 2


# ---------------------------------------------------------------------- late and lost ranks


def fresh(
    num_ranks: int, case: Case, calls: int, *, fast: bool = False, hook: bool = False
) -> tuple[VirtualGroup, CombineCall]:
    """Return new ranks that have made some calls, and the next call."""
    group = VirtualGroup(Ranks(num_ranks), case.shape)
    for seed in range(calls):
        CombineCall(group, replace(case, seed=seed)).run()
    group.ranks.call += 1
    return group, CombineCall(group, replace(case, seed=calls), fast=fast, hook=hook)


@by_numerics
@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_rank_that_never_sends(calls, fast):
    """The first block to miss the deadline reports it: the one that compares signatures, or one that waits for rows."""
    group, call = fresh(2, Case((4, 3), 4, 3), calls, fast=fast)
    call.launch(only=(0,), timeout_s=SHORT_S)
    group.ranks.wait()
    record = group.ranks.record(0)
    assert record is not None
    assert (record.call, record.peer, record.blamed) == (group.ranks.call, 1, 1)
    seen = {Fault.late_handshake: max(calls - 1, 0), Fault.late_rows: 0}[Fault(record.code)]
    assert (record.seen, record.expected) == (seen, calls + 1)
    assert record.waited_ms >= SHORT_S * 1000
    assert group.ranks.failed() == [record.code, 0]
    assert int(group.ranks.words(1, "gave_up", 8, torch.int64)[0]) == record.code << 32 | 1


def lose_packet(group: VirtualGroup, call: CombineCall, at: int, row: int) -> None:
    """Clear the first packet of a row before it is received."""
    packets = decode_combine_spec.packets_of_chunk(call.case.dtype.itemsize, decode_combine_spec.SAME)
    chunks = -(-call.case.hidden // decode_combine_spec.CHUNK_COLUMNS)
    start = group.workspaces[at].answers_at + (call.epoch & 1) * group.sizes.answers + row * chunks * packets * 16
    there = group.blocks[at].tensor[start : start + 16]
    assert (there != 0xFF).any(), "there is no packet"
    there.fill_(0xFF)


def test_rows_that_never_come():
    """The signature arrives, a packet does not."""
    group, call = fresh(2, Case((4, 3), 4, 2, routing="all_to_expert_0"), 2, hook=True)
    call.launch(SEND)
    group.ranks.wait()
    lose_packet(group, call, at=1, row=2 * 2)  # the third token's first slot
    call.launch(RECEIVE, only=(1,), timeout_s=SHORT_S)
    group.ranks.wait()
    record = group.ranks.record(1)
    assert record is not None
    assert (record.code, record.peer, record.blamed) == (Fault.late_rows, 0, 0)
    assert (record.seen, record.expected) == (0, 3)


@by_numerics
@pytest.mark.parametrize("num_ranks", [2, 5])
@pytest.mark.parametrize("routing", ["even", "half_dropped"])
def test_a_late_rank_is_masked(routing, num_ranks, fast):
    """The others continue without it, and their sums leave out its experts."""
    case = Case((6, 5, 7, 0, 1)[:num_ranks], 2 * num_ranks, 4, hidden=264, routing=routing)
    group, call = fresh(num_ranks, case, 1, fast=fast)
    there = [rank for rank in range(num_ranks) if rank != 1]
    call.launch(only=there, mask_late=1, timeout_s=late_s(num_ranks))
    group.ranks.wait()
    group.ranks.check_quiet()
    check_without(call, gone=1)
    after = CombineCall(group, replace(case, seed=9), fast=fast, hook=True)
    after.launch(only=there, mask_late=1)
    group.ranks.wait()
    group.ranks.check_quiet()
    check_without(after, gone=1)
    pending = [after.pending[rank].tolist() for rank in there]
    assert pending == [[after.epoch, (1 << num_ranks) - 1 & ~2]] * (num_ranks - 1)


def check_without(call: CombineCall, gone: int) -> None:
    """Check the results as if no token had chosen the experts of rank ``gone``, which is masked."""
    check_sums_without(call, gone)
    for rank in range(call.case.ranks):
        if rank != gone:
            assert int(call.ranks.words(rank, "masked")) == 1 << gone
            masked = call.group.masked[rank].tolist()[: call.case.ranks]
            assert masked == [int(peer == gone) for peer in range(call.case.ranks)]


def check_sums_without(call: CombineCall, gone: int) -> None:
    case, local = call.case, call.num_local
    sent = []
    for had in call.inputs:
        away = had.topk_idx // local == gone
        sent.append(replace(had, topk_idx=torch.where(away, -1, had.topk_idx)))
    expected = Oracle(sent, case.experts, "masked", capacity=call.capacity)
    for rank in range(case.ranks):
        if rank == gone:
            continue
        # Rows keep their places; only the sums have fewer terms.
        expected._places = call.oracle._places
        want = expected.decode_combine(rank, call.ys, fast=call.fast)
        got = call.sums(rank)
        assert got.equal(want), f"{call} rank {rank}: {(got != want).nonzero()[:5].tolist()}"


@by_numerics
def test_a_rank_that_is_lost_while_it_sends(fast):
    """The packets of the lost rank are cleared unused: two calls later they would be taken for another rank's."""
    group, call = fresh(2, Case((8, 8), 4, 2, hidden=64), 1, fast=fast)
    places = call._tables[1][PLACES:].view(2, group.shape.max_tokens, 2)
    places[:, :4] = -1  # it sends only the rows of each rank's later tokens
    call.launch(SEND, only=(1,))
    group.ranks.wait()
    group.sends[COMBINE] -= 1
    call.launch(only=(0,), mask_late=1, timeout_s=SHORT_S)
    group.ranks.wait()
    group.ranks.check_quiet()
    assert int(group.ranks.words(0, "masked")) == 2
    group.check_clear(only=(0,))


def test_a_masked_rank_that_gives_up():
    """A CUDA graph captured before a rank was masked still lists it as a participant, and continues nevertheless."""
    group, call = fresh(3, Case((5, 4, 3), 6, 2, hidden=64), 1)
    for rank in (0, 1):
        group.ranks.words(rank, "masked").fill_(4)
        group.ranks.words(rank, "gave_up", 1, torch.int64, first=2).fill_(1 << 32)  # of rank 2, waiting for rank 0
    call.begin(BOTH)
    group.ranks.delay(1, 100)
    group.ranks.launch(decode_combine_spec.SPEC, [call.fields(0), call.fields(1), None], (3, THREADS, 0), call.config)
    group.ranks.wait()
    group.ranks.check_quiet()
    check_sums_without(call, gone=2)


@pytest.mark.parametrize("calls", [1, 2])
def test_rows_that_have_not_arrived_are_not_acknowledged(calls):
    """Otherwise peers would overwrite them before they are received."""
    group, call = fresh(2, Case((3, 3), 4, 2, hidden=64), calls)
    call.launch(only=(0,), timeout_s=SHORT_S)
    group.ranks.wait()
    acks = group.ranks.words(1, "acks", 2, first=2 * COMBINE * MAX_RANKS).tolist()
    assert max(acks) < call.epoch


@by_numerics
def test_a_rank_that_the_dispatch_left_out(fast):
    """No rank waits for it or sends to it, although it is no longer masked."""
    case = Case((6, 5, 7), 6, 4, hidden=264, routing="half_dropped")
    group, call = fresh(3, case, 1, fast=fast, hook=True)
    for rank in (0, 2):
        call._tables[rank][ALIVE] = 5
        call._tables[rank][TOKENS + 1] = 0
    before = group.blocks[1].cpu().clone()
    call.launch(only=(0, 2), timeout_s=late_s(3))
    group.ranks.wait()
    group.ranks.check_quiet()
    check_sums_without(call, gone=1)
    assert [call.pending[rank].tolist() for rank in (0, 2)] == [[call.epoch, 5]] * 2
    assert group.blocks[1].cpu().equal(before), "something was sent to rank 1"
    assert not any(int(group.ranks.words(rank, "masked")) for rank in range(3))


def test_a_late_rank_is_waited_for_once():
    """A token with many rows from that rank does not wait again for each batch of them."""
    case = Case((3, 0), 64, 32, routing="even")
    group, call = fresh(2, case, 0)
    start = time.monotonic()
    call.launch(only=(0,), mask_late=1, timeout_s=3.0)
    group.ranks.wait()
    group.ranks.check_quiet()
    check_without(call, gone=1)
    assert time.monotonic() - start < 2.5 * 3.0


@pytest.mark.parametrize("word", [0, 1, 13, DISPATCH_WORD])
def test_a_peer_that_calls_something_else(word):
    """The peer dispatches, or combines the rows of another dispatch."""
    group, call = fresh(2, Case((4, 3), 4, 2), 1)
    handshakes = [{0: 7, 1: 0}, {0: 7, 1: 0, word: 99}]
    call.begin(BOTH)
    if word == DISPATCH_WORD:
        handshakes[0][word] = int(call._tables[0][EPOCH])
        call._tables[1][EPOCH] = 99
    fields = [call.fields(rank, handshake=handshakes[rank]) for rank in range(2)]
    group.ranks.launch(decode_combine_spec.SPEC, fields, (3, THREADS, 0), call.config)
    group.ranks.wait()
    records = [group.ranks.record(rank) for rank in range(2)]
    for rank, record in enumerate(records):
        assert record is not None
        if record.code == Fault.peer_gave_up:
            assert (record.peer, record.word) == (1 - rank, Fault.mismatch)
            continue
        assert (record.code, record.peer, record.word) == (Fault.mismatch, 1 - rank, word)
        assert (record.seen, record.expected) == (handshakes[1 - rank].get(word, 0), handshakes[rank].get(word, 0))
