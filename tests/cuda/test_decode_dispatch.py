"""The kernel decode_dispatch alone, on virtual ranks: every byte that it may touch, and late ranks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from support.virtual_decode import (
    ALIVE,
    BOTH,
    DISPATCH,
    RECEIVE,
    SCALES,
    SEND,
    THREADS,
    TYPES,
    Bed,
    Combine,
    Dispatch,
    all_at_once,
    decode_ranks,
    sends_and_receipts_at_once,
    the_third_waits_for_room,
)
from support.virtual_ranks import MACHINE, POISON, Ranks
from tokenferry import Scale
from tokenferry.kernels.control_block import Fault
from tokenferry.kernels.decode_dispatch import spec as decode_dispatch_spec
from tokenferry.testing.cases import ROUTINGS, Case
from tokenferry.types import MoeShape

SHORT_S = 0.2
"""Deadline of kernels whose peer never launches."""
TOKENS = (6, 0, 11, 1, 4, 2, 9, 33)
"""Tokens of up to eight ranks."""


def check_call(case: Case, fp8: Scale | None = None, *, max_tokens: int = 0, prepared: bool = False) -> Dispatch:
    """Make one call twice, for both halves of the workspaces, and check it."""
    bed = Bed.of(case, max_tokens)
    for seed in (case.seed, case.seed + 1):
        one = Dispatch(bed, replace(case, seed=seed), fp8, prepared=prepared, counts=seed == 1)
        one.run()
        one.check()
        bed.check_clear()
    return one


@pytest.fixture
def host_prepares(monkeypatch):
    """Let the host prepare all choices, those of small routings, too."""
    monkeypatch.setattr(decode_dispatch_spec, "CHOICES_BYTES", 0)


# ---------------------------------------------------------------------- what is sent


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing(routing, num_ranks):
    top_k = (4, 3, 8, 6, 2, 5, 7, 9)[ROUTINGS.index(routing)]
    check_call(Case(TOKENS[:num_ranks], 5 * num_ranks, top_k, routing=routing, hidden=24))


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 7, 8, 11, 16, 31, 32, 33, 48, 64])
@pytest.mark.parametrize("routing", ["repeated", "half_dropped"])
def test_every_number_of_choices(routing, top_k):
    """The choices of a token lie in one warp or two, and are marked at once or later; a note holds three."""
    check_call(Case((7, 5), 2 * 37, top_k, routing=routing, weights=top_k != 5))


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("top_k", [1, 2, 6, 32, 33, 64])
@pytest.mark.usefixtures("host_prepares")
def test_choices_that_the_host_prepares(num_ranks, top_k):
    kinds = ("repeated", "half_dropped") if top_k < 64 else ("repeated",)
    for routing in kinds:
        idx_dtype = torch.int32 if top_k % 4 else torch.int64
        check_call(Case(TOKENS[:num_ranks], 17 * num_ranks, top_k, routing=routing, idx_dtype=idx_dtype), prepared=True)


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights", [True, False])
def test_every_kind_of_index(idx_dtype, weights):
    for dtype in (*TYPES, torch.float64):
        check_call(Case((9, 0, 4), 6, 4, hidden=24, dtype=dtype, idx_dtype=idx_dtype, weights=weights))


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
@pytest.mark.parametrize(("experts", "top_k"), [(4096, 8), (4096, 64), (255, 33)])
def test_many_experts(num_ranks, experts, top_k):
    experts -= experts % num_ranks
    check_call(Case((3, 5, 0, 1, 2)[:num_ranks], experts, top_k, hidden=8, weights=top_k != 33))


@pytest.mark.parametrize("num_local", [41, 47, 1351])
def test_first_and_last_experts_of_ranks(num_local):
    """The rank of an expert is found without a division; for these L the plain product with 1 / L is too small."""
    chosen = [e for rank in range(3) for e in (rank * num_local, rank * num_local + num_local - 1)]
    case = Case((len(chosen), 0, 1), 3 * num_local, 1, hidden=8)
    sent = list(case.inputs())
    sent[0] = replace(sent[0], topk_idx=torch.tensor(chosen)[:, None])
    bed = Bed.of(case)
    one = Dispatch(bed, case, sent=sent)
    one.run()
    one.check()
    bed.check_clear()


@pytest.mark.parametrize("hidden", [8, 24, 248, 256, 264, 1000, 1032, 7168, 16 * 1024])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_rows_of_every_size(num_ranks, hidden):
    """From one packet to several chunks; a chunk is 64 packets to send, 128 to receive, of 16 bytes each."""
    tokens = (5, 0, 3) if hidden > 4000 else (40, 0, 17)
    check_call(Case(tokens[:num_ranks], 2 * num_ranks, 3, hidden=hidden, routing="half_dropped"))


@pytest.mark.parametrize("fp8", SCALES[1:], ids=lambda scale: scale.name)
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("num_ranks", [2, 5])
def test_casts(num_ranks, dtype, fp8):
    """Scales of 128 columns, packets of 512, chunks of 2048: ends of all of them."""
    for hidden in (16, 128, 144, 512, 528, 640, 2064):
        tokens = (3, 2, 0, 1, 2)[:num_ranks]
        check_call(Case(tokens, 2 * num_ranks, 3, hidden=hidden, dtype=dtype, routing="half_dropped"), fp8)


@pytest.mark.parametrize("fp8", SCALES[1:], ids=lambda scale: scale.name)
def test_casts_of_wide_rows(fp8):
    check_call(Case((2, 3), 4, 2, hidden=7168), fp8)


def test_casts_of_rows_without_a_size():
    """Zeros have the least scale, and what is too large for it the largest number."""
    case = Case((4, 3), 4, 2, hidden=256)
    sent = list(case.inputs())
    sent[0].x[0] = 0.0
    sent[0].x[1, :128] = -0.0
    sent[1].x[0] = torch.finfo(torch.bfloat16).max
    sent[1].x[1] = torch.finfo(torch.bfloat16).tiny
    bed = Bed.of(case)
    for fp8 in SCALES[1:]:
        one = Dispatch(bed, case, fp8, sent=sent)
        one.run()
        one.check()
        bed.check_clear()


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_room_for_many_tokens(num_ranks):
    """M = 4096, of which some ranks bring few."""
    tokens = (70, 1, 0, 40, 3)[:num_ranks]
    check_call(Case(tokens, 2 * num_ranks, 3, hidden=8, routing="repeated"), max_tokens=4096)


@pytest.mark.parametrize(("top_k", "num_ranks"), [(16, 5), (17, 5)])
def test_most_tokens(top_k, num_ranks):
    """The largest routing that a block keeps, and one that the host prepares."""
    bed = Bed(Ranks(num_ranks, 200 << 20), MoeShape(2 * num_ranks, top_k, 8, 4096), item_bytes=2)
    case = Case((4096, 0, 4095, 1, 33), 2 * num_ranks, top_k, hidden=8, routing="repeated", weights=False)
    one = Dispatch(bed, case, prepared=top_k == 17)
    one.run()
    one.check()
    bed.check_clear()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_nobody_has_tokens(num_ranks):
    check_call(Case((0,) * num_ranks, 2 * num_ranks, 2))


def test_rows_that_look_like_no_packet():
    """16 bytes of ones are the sentinel: such rows arrive all the same, as other NaNs."""
    case = Case((5, 4), 4, 3, hidden=1000)
    sent = case.inputs()
    sent[0].x[1:3] = torch.tensor(-1, dtype=torch.int16).view(torch.bfloat16)
    sent[1].x[0, 8:16] = torch.tensor(-1, dtype=torch.int16).view(torch.bfloat16)
    bed = Bed.of(case)
    one = Dispatch(bed, case, sent=sent)
    one.run()
    one.check()
    bed.check_clear()


@pytest.mark.parametrize("blocks", [2, 9])
def test_any_number_of_blocks(blocks):
    """One block for rows, and one for counts; or more blocks than tokens."""
    case = Case((21, 4), 6, 4, hidden=520)
    bed = Bed.of(case)
    for seed in range(3):
        one = Dispatch(bed, replace(case, seed=seed))
        one.begin(BOTH)
        size = (blocks, 32 if blocks == 2 else THREADS, one.sizes[2])
        bed.ranks.run(decode_dispatch_spec.SPEC, [one.fields(rank) for rank in range(2)], size, one.config)
        one.check()
        bed.check_clear()


# ---------------------------------------------------------------------- call after call


def varied(num_ranks: int, seed: int, *, weights: bool = True) -> Case:
    """Return another case of the same sizes."""
    tokens = tuple((7 * seed + 5 * rank) % 13 for rank in range(num_ranks))
    return Case(tokens, 4 * num_ranks, 5, hidden=272, routing=ROUTINGS[seed % 3], seed=seed, weights=weights)


SHAPE = MoeShape(4 * 8, 5, 272, 12)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_many_calls_at_once(num_ranks):
    """Twelve calls on every stream before the first has ended: halves alternate, acks keep ranks from running ahead."""
    bed = Bed(decode_ranks(num_ranks), replace(SHAPE, num_experts=4 * num_ranks))
    calls = [Dispatch(bed, varied(num_ranks, seed), SCALES[seed % 2]) for seed in range(12)]
    all_at_once(calls)


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_sends_before_their_receipts(num_ranks):
    """A launch that sends, then one that receives; at most two sends are not yet received."""
    bed = Bed(decode_ranks(num_ranks), replace(SHAPE, num_experts=4 * num_ranks))
    calls = [Dispatch(bed, varied(num_ranks, seed)) for seed in range(9)]
    calls[0].run(SEND)
    for landed in calls[0].landed:
        assert (landed["out"].cpu() == POISON).all(), "a launch that only sends has received"
    for before, one in itertools.pairwise(calls):
        one.run(SEND)
        before.run(RECEIVE)
        before.check()
    calls[-1].run(RECEIVE)
    calls[-1].check()
    bed.check_clear()


def test_sends_and_receipts_at_once():
    """The same without waiting in between, with calls that do both."""
    bed = Bed(decode_ranks(3), replace(SHAPE, num_experts=12))
    calls = [Dispatch(bed, varied(3, seed), counts=True) for seed in range(14)]
    sends_and_receipts_at_once(calls)


def test_receipts_in_another_order():
    """The second of two calls may be received first."""
    bed = Bed(decode_ranks(2), replace(SHAPE, num_experts=8))
    for seed in range(0, 8, 2):
        first, second = (Dispatch(bed, varied(2, seed + i)) for i in (0, 1))
        first.run(SEND)
        second.run(SEND)
        second.run(RECEIVE)
        first.run(RECEIVE)
        first.check()
        second.check()
        bed.check_clear()


@pytest.mark.parametrize("before", [None, -3, -2])
def test_a_rank_waits_until_its_peer_has_received(before):
    """The third send would overwrite the first: it waits until all peers have received that one and said so.

    Also where epochs wrap around: 0 and those behind it are epochs like others.
    """
    bed = Bed(decode_ranks(2) if before is None else Ranks(2), replace(SHAPE, num_experts=8))
    if before is not None:
        bed.start_at(before)
    first, second, third = (Dispatch(bed, varied(2, seed), counts=True) for seed in (1, 2, 3))
    the_third_waits_for_room(first, second, third)
    assert third.wait_ns[0][1] > 0, "rank 0 has waited for rank 1, and has not counted the time"


@pytest.mark.parametrize("late", [0, 2])
def test_a_late_rank_is_waited_for_and_the_time_counted(late):
    """The ranks that wait add the time to the late rank's entry."""
    case = varied(3, 4)
    bed = Bed.of(case)
    one = Dispatch(bed, case, counts=True)
    bed.ranks.delay(late, 40)
    one.run()
    one.check()
    for rank in range(3):
        waited = one.wait_ns[rank].tolist()
        assert waited[rank] == 0, "a rank waited for itself"
        if rank != late:
            assert waited[late] > 10_000_000, waited


def test_counters_add_up():
    bed = Bed(decode_ranks(2), replace(SHAPE, num_experts=8))
    first, second = (Dispatch(bed, varied(2, seed), counts=True) for seed in (3, 4))
    second.received = first.received
    first.run()
    first.check()
    second.launch(BOTH)
    bed.ranks.wait()
    for rank in range(2):
        counts = [torch.tensor(one.oracle.expert_counts(rank)) for one in (first, second)]
        assert first.received[rank].tolist() == (counts[0] + counts[1] + 5).tolist()


# ---------------------------------------------------------------------- bad indices


@pytest.mark.parametrize("index", [12, -2, 13_000, 1 << 40, -(1 << 40)])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_bad_index_sends_nothing(index, prepared, monkeypatch):
    """It is recorded; the peers wait; the call is repeated with a good routing."""
    if prepared:
        monkeypatch.setattr(decode_dispatch_spec, "CHOICES_BYTES", 0)
    case = Case((9, 7, 8), 12, 5, hidden=264, routing="half_dropped")
    bed = Bed.of(case)
    good = Dispatch(bed, case, prepared=prepared)
    sent = list(case.inputs())
    spoilt = sent[1].topk_idx.clone()
    spoilt[3, 2] = index
    spoilt[5, 0] = 99  # not the least slot
    sent[1] = replace(sent[1], topk_idx=spoilt)
    bad = Dispatch(bed, case, sent=(sent[0], replace(sent[1], topk_idx=sent[1].topk_idx.clamp(-1, 11)), sent[2]))
    bad._up[1][1] = bed.ranks.on_device(spoilt)
    bad.prepared = prepared
    before = [block.cpu().clone() for block in bed.blocks]
    bed.ranks.call += 1
    bad.launch(only=(1,))
    bed.ranks.wait(1)
    bed.sends[DISPATCH] -= 1
    record = bed.ranks.record(1)
    assert record is not None
    recorded = max(-(1 << 31), min(index, (1 << 31) - 1)) & 0xFFFFFFFF
    assert (record.code, record.call) == (Fault.bad_routing, bed.ranks.call)
    assert (record.peer, record.word, record.seen, record.expected) == (2, 3, recorded, 12)
    for rank, block in enumerate(bed.blocks):
        assert block.cpu().equal(before[rank]), f"something was sent to rank {rank}"
    assert bed.ranks.failed() == [0, 0, 0]
    assert bad.landed[1]["table"].cpu().view(torch.int32)[ALIVE] == 0
    # Later calls along this plan are aborted.
    bad.launch(RECEIVE, only=(1,))
    bed.ranks.wait()
    assert (bad.landed[1]["out"].cpu() == POISON).all()
    good.run()
    good.check()
    bed.check_clear()


def test_peers_of_a_bad_index_wait_for_the_next_try():
    case = Case((9, 7), 8, 3, hidden=24)
    bed = Bed.of(case)
    one = Dispatch(bed, case)
    right, spoilt = one._up[1][1], one._up[1][1].clone()
    spoilt[6, 2] = 8
    one._up[1][1] = spoilt
    one.launch()
    bed.ranks.wait(1)
    record = bed.ranks.record(1)
    assert record is not None
    assert record.code == Fault.bad_routing
    assert not bed.ranks.streams[0].query(), "rank 0 did not wait"
    one._up[1][1] = right
    bed.sends[DISPATCH] -= 1
    one.launch(only=(1,))
    bed.ranks.wait()
    bed.ranks.check_quiet()
    one.check()
    bed.check_clear()


# ---------------------------------------------------------------------- late and lost ranks


def fresh(num_ranks: int, case: Case, calls: int) -> tuple[Bed, Dispatch]:
    """Return new ranks that have made some calls, and another call."""
    bed = Bed(Ranks(num_ranks), case.shape)
    for seed in range(calls):
        one = Dispatch(bed, replace(case, seed=seed))
        one.run()
    bed.ranks.call += 1
    return bed, Dispatch(bed, replace(case, seed=calls))


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_rank_that_never_sends(calls):
    """The other rank records which one, and which epochs: messages of every second epoch lie in the same place."""
    bed, one = fresh(2, Case((4, 3), 4, 2), calls)
    ranks = bed.ranks
    one.launch(only=(0,), timeout_s=SHORT_S)
    ranks.wait()
    record = ranks.record(0)
    assert record is not None
    assert ranks.record(1) is None
    assert (record.code, record.call, record.peer, record.blamed) == (Fault.late_handshake, ranks.call, 1, 1)
    assert (record.seen, record.expected) == (max(calls - 1, 0), calls + 1)
    assert record.waited_ms >= SHORT_S * 1000
    assert ranks.failed() == [Fault.late_handshake, 0]
    assert int(ranks.words(1, "gave_up", 8, torch.int64)[0]) == Fault.late_handshake << 32 | 1
    # The rank that is too late sees that it was given up.
    one.begin = lambda phases: None
    one.launch(only=(1,))
    ranks.wait()
    record = ranks.record(1)
    if record is not None:  # all that it needed was here: it had no reason to look
        assert (record.code, record.peer, record.word, record.blamed) == (
            Fault.peer_gave_up,
            0,
            Fault.late_handshake,
            1,
        )


def test_after_a_fault_kernels_return_at_once():
    bed, one = fresh(2, Case((4, 3), 4, 2), 1)
    one.launch(only=(0,), timeout_s=SHORT_S)
    bed.ranks.wait()
    assert bed.ranks.record(0) is not None
    after = Dispatch(bed, one.case)
    after.launch(only=(0,))
    bed.ranks.wait()
    assert bed.ranks.record(0) is None
    for block in after.landed[0].values():
        assert (block.cpu() == POISON).all()


def test_rows_that_never_come():
    """Counts and notes are here, a packet is not: the record has the epoch of the row's note."""
    bed, one = fresh(2, Case((4, 3), 4, 2, hidden=264, routing="all_to_expert_0"), 2)
    one.launch(SEND)
    bed.ranks.wait()
    lose_packet(bed, one, at=0, src=1)
    one.launch(RECEIVE, only=(0,), timeout_s=SHORT_S)
    bed.ranks.wait()
    record = bed.ranks.record(0)
    assert record is not None
    assert (record.code, record.peer, record.blamed) == (Fault.late_rows, 1, 1)
    assert (record.seen, record.expected) == (3, 3)


def lose_packet(bed: Bed, one: Dispatch, at: int, src: int) -> None:
    """Take the last packet of a rank's first token away before it is received."""
    workspace, R = bed.workspaces[at], one.case.ranks
    start = workspace.rows_at + ((one.epoch & 1) * R + src) * bed.sizes.rows + one.row_bytes - 16
    there = bed.blocks[at].tensor[start : start + 16]
    assert (there != 0xFF).any(), "there is no packet"
    there.fill_(0xFF)


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_a_late_rank_is_masked(num_ranks):
    """The others go on without it, in this call and in those that follow."""
    case = Case((6, 5, 7, 0, 1)[:num_ranks], 2 * num_ranks, 4, hidden=264)
    bed, one = fresh(num_ranks, case, 1)
    there, all_ranks = [rank for rank in range(num_ranks) if rank != 1], (1 << num_ranks) - 1
    one.launch(only=there, mask_late=1, timeout_s=late_s(num_ranks))
    bed.ranks.wait()
    bed.ranks.check_quiet()
    assert not any(bed.ranks.failed())
    check_without(one, gone=1, alive=all_ranks)
    after = Dispatch(bed, replace(case, seed=9))
    after.launch(only=there, mask_late=1)
    bed.ranks.wait()
    bed.ranks.check_quiet()
    check_without(after, gone=1, alive=all_ranks & ~2)


def late_s(num_ranks: int) -> float:
    """A deadline by which all ranks but one are here."""
    return SHORT_S if num_ranks == 2 or MACHINE.device.type == "cuda" else 3.0


def check_without(one: Dispatch, gone: int, alive: int) -> None:
    """Expect no tokens of a rank, and no rows for its experts."""
    bed, case = one.bed, one.case
    sent = [
        replace(had, x=had.x[:0], topk_idx=had.topk_idx[:0], topk_weights=had.topk_weights[:0]) if rank == gone else had
        for rank, had in enumerate(one.inputs)
    ]
    expected = Dispatch(bed, case, sent=sent)
    expected.landed, expected.epoch, expected.alive = one.landed, one.epoch, alive
    expected.check([rank for rank in range(case.ranks) if rank != gone])
    for rank in range(case.ranks):
        if rank == gone:
            continue
        assert int(bed.ranks.words(rank, "masked")) == 1 << gone
        assert bed.masked[rank].tolist()[: case.ranks] == [int(peer == gone) for peer in range(case.ranks)]


def test_a_rank_whose_rows_are_lost_is_masked():
    case = Case((4, 3), 4, 2, hidden=264, routing="all_to_expert_0")
    bed, one = fresh(2, case, 0)
    one.launch(SEND)
    bed.ranks.wait()
    lose_packet(bed, one, at=0, src=1)
    one.launch(RECEIVE, only=(0,), mask_late=1, timeout_s=SHORT_S)
    bed.ranks.wait()
    bed.ranks.check_quiet()
    assert int(bed.ranks.words(0, "masked")) == 2
    own = one.landed[0]["out"].cpu().reshape(-1, one.row_bytes)[:4]
    assert own.equal(one.rows_of(0)), "own rows were lost with the others"


@pytest.mark.parametrize("word", [0, 1, 13])
def test_a_peer_that_calls_something_else(word):
    """Another signature: both ranks record the word, or that the other rank saw it first."""
    bed, one = fresh(2, Case((4, 3), 4, 2), 1)
    handshakes = [{0: 6, 1: 4}, {0: 6, 1: 4, word: 99}]
    fields = [one.fields(rank, handshake=handshakes[rank]) for rank in range(2)]
    bed.ranks.launch(decode_dispatch_spec.SPEC, fields, one.sizes, one.config)
    bed.ranks.wait()
    for rank in range(2):
        record = bed.ranks.record(rank)
        assert record is not None
        if record.code == Fault.peer_gave_up:
            assert (record.peer, record.word) == (1 - rank, Fault.mismatch)
            continue
        assert (record.code, record.peer, record.word) == (Fault.mismatch, 1 - rank, word)
        assert (record.seen, record.expected) == (handshakes[1 - rank].get(word, 0), handshakes[rank].get(word, 0))
    assert all(bed.ranks.failed())


def test_a_peer_that_is_in_the_other_channel():
    """One rank dispatches, one combines: both record it long before the deadline."""
    case = Case((4, 3), 4, 2)
    bed, one = fresh(2, case, 1)
    other = Combine(bed, case)
    one.launch(only=(0,))
    other.launch(only=(1,))
    bed.ranks.wait()
    for rank in range(2):
        record = bed.ranks.record(rank)
        assert record is not None
        if record.code == Fault.peer_gave_up:
            assert record.word == Fault.mismatch
        else:
            assert (record.code, record.peer, record.word) == (Fault.mismatch, 1 - rank, 0)
            assert (record.seen, record.expected) == ((7, 6) if rank == 0 else (6, 7))
