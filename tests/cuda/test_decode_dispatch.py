"""The kernel `decode_dispatch` alone, on virtual ranks: every byte that it may write, and late ranks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from support.not_finite import any_bits, spoil
from support.virtual_decode import (
    ALIVE,
    BOTH,
    DISPATCH,
    RECEIVE,
    SCALES,
    SEND,
    SHORT_S,
    THREADS,
    TYPES,
    CombineCall,
    DispatchCall,
    VirtualGroup,
    decode_ranks,
    late_s,
    launch_back_to_back,
    sends_and_receives_back_to_back,
    third_send_waits_for_acks,
)
from support.virtual_ranks import POISON, Ranks
from tokenferry import Scale
from tokenferry.kernels.control_block import Fault
from tokenferry.kernels.decode_dispatch import spec as decode_dispatch_spec
from tokenferry.testing.cases import ROUTINGS, Case
from tokenferry.types import MoeShape

TOKENS = (6, 0, 11, 1, 4, 2, 9, 33)
"""Numbers of tokens of up to eight ranks."""


def check_dispatch(
    case: Case, fp8: Scale | None = None, *, max_tokens: int = 0, prepared: bool = False
) -> DispatchCall:
    """Check two calls without faults, one for each epoch parity; return the last."""
    group = VirtualGroup.of(case, max_tokens)
    for seed in (case.seed, case.seed + 1):
        call = DispatchCall(group, replace(case, seed=seed), fp8, prepared=prepared, counts=seed == 1)
        call.run()
        call.check()
        group.check_clear()
    return call


@pytest.fixture
def host_prepares(monkeypatch):
    """Let the host prepare the choices of small routings, too."""
    monkeypatch.setattr(decode_dispatch_spec, "CHOICES_BYTES", 0)


# ---------------------------------------------------------------------- what is sent


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing(routing, num_ranks):
    top_k = (4, 3, 8, 6, 2, 5, 7, 9)[ROUTINGS.index(routing)]
    check_dispatch(Case(TOKENS[:num_ranks], 5 * num_ranks, top_k, routing=routing, hidden=24))


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 7, 8, 11, 16, 31, 32, 33, 48, 64])
@pytest.mark.parametrize("routing", ["repeated", "half_dropped"])
def test_every_number_of_choices(routing, top_k):
    """A token's choices lie in one warp or in two, are marked as they are read or later, and fill notes by threes."""
    check_dispatch(Case((7, 5), 2 * 37, top_k, routing=routing, weights=top_k != 5))


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("top_k", [1, 2, 6, 32, 33, 64])
@pytest.mark.usefixtures("host_prepares")
def test_choices_that_the_host_prepares(num_ranks, top_k):
    kinds = ("repeated", "half_dropped") if top_k < 64 else ("repeated",)
    for routing in kinds:
        idx_dtype = torch.int32 if top_k % 4 else torch.int64
        check_dispatch(
            Case(TOKENS[:num_ranks], 17 * num_ranks, top_k, routing=routing, idx_dtype=idx_dtype), prepared=True
        )


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights", [True, False])
def test_every_kind_of_index(idx_dtype, weights):
    for dtype in (*TYPES, torch.float64):
        check_dispatch(Case((9, 0, 4), 6, 4, hidden=24, dtype=dtype, idx_dtype=idx_dtype, weights=weights))


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
@pytest.mark.parametrize(("experts", "top_k"), [(4096, 8), (4096, 64), (255, 33)])
def test_many_experts(num_ranks, experts, top_k):
    experts -= experts % num_ranks
    check_dispatch(Case((3, 5, 0, 1, 2)[:num_ranks], experts, top_k, hidden=8, weights=top_k != 33))


@pytest.mark.parametrize("num_local", [41, 47, 1351])
def test_first_and_last_experts_of_ranks(num_local):
    """The rank of an expert is found without a division; for these L the plain product with 1 / L is too small."""
    chosen = [e for rank in range(3) for e in (rank * num_local, rank * num_local + num_local - 1)]
    case = Case((len(chosen), 0, 1), 3 * num_local, 1, hidden=8)
    sent = list(case.inputs())
    sent[0] = replace(sent[0], topk_idx=torch.tensor(chosen)[:, None])
    group = VirtualGroup.of(case)
    call = DispatchCall(group, case, sent=sent)
    call.run()
    call.check()
    group.check_clear()


@pytest.mark.parametrize("hidden", [8, 24, 248, 256, 264, 1000, 1032, 7168, 16 * 1024])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_rows_of_every_size(num_ranks, hidden):
    """From one packet to several chunks: 64 packets of 16 bytes are sent, and 128 received, at a time."""
    tokens = (5, 0, 3) if hidden > 4000 else (40, 0, 17)
    check_dispatch(Case(tokens[:num_ranks], 2 * num_ranks, 3, hidden=hidden, routing="half_dropped"))


@pytest.mark.parametrize("fp8", SCALES[1:], ids=lambda scale: scale.name)
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("num_ranks", [2, 5])
def test_casts(num_ranks, dtype, fp8):
    """Row sizes at the ends of scales (128 columns), packets of scales (512) and chunks (2048)."""
    for hidden in (16, 128, 144, 512, 528, 640, 2064):
        tokens = (3, 2, 0, 1, 2)[:num_ranks]
        check_dispatch(Case(tokens, 2 * num_ranks, 3, hidden=hidden, dtype=dtype, routing="half_dropped"), fp8)


@pytest.mark.parametrize("fp8", SCALES[1:], ids=lambda scale: scale.name)
def test_casts_of_wide_rows(fp8):
    check_dispatch(Case((2, 3), 4, 2, hidden=7168), fp8)


def test_casts_of_extreme_rows():
    """Zeros get the smallest scale; the largest and the smallest number of the type are cast, too."""
    case = Case((4, 3), 4, 2, hidden=256)
    sent = list(case.inputs())
    sent[0].x[0] = 0.0
    sent[0].x[1, :128] = -0.0
    sent[1].x[0] = torch.finfo(torch.bfloat16).max
    sent[1].x[1] = torch.finfo(torch.bfloat16).tiny
    group = VirtualGroup.of(case)
    for fp8 in SCALES[1:]:
        call = DispatchCall(group, case, fp8, sent=sent)
        call.run()
        call.check()
        group.check_clear()


@pytest.mark.parametrize("fp8", SCALES[1:], ids=lambda scale: scale.name)
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])
def test_casts_of_what_is_not_finite(dtype, fp8):
    """Infinities and NaNs become the NaN without a sign, at their places; the columns beside them do not change."""
    for hidden in (16, 144, 640):
        case = Case((9, 4), 4, 2, hidden=hidden, dtype=dtype)
        group = VirtualGroup.of(case)
        for change in (spoil, any_bits):
            sent = [replace(one, x=change(one.x)) for one in case.inputs()]
            call = DispatchCall(group, case, fp8, sent=sent)
            call.run()
            call.check()
            group.check_clear()


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_few_of_many_tokens(num_ranks):
    """M = 4096, and ranks send few tokens."""
    tokens = (70, 1, 0, 40, 3)[:num_ranks]
    check_dispatch(Case(tokens, 2 * num_ranks, 3, hidden=8, routing="repeated"), max_tokens=4096)


@pytest.mark.parametrize(("top_k", "num_ranks"), [(16, 5), (17, 5)])
def test_most_tokens(top_k, num_ranks):
    """The largest routing that a block keeps, and one that the host prepares."""
    group = VirtualGroup(Ranks(num_ranks, 200 << 20), MoeShape(2 * num_ranks, top_k, 8, 4096), item_bytes=2)
    case = Case((4096, 0, 4095, 1, 33), 2 * num_ranks, top_k, hidden=8, routing="repeated", weights=False)
    call = DispatchCall(group, case, prepared=top_k == 17)
    call.run()
    call.check()
    group.check_clear()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_no_rank_has_tokens(num_ranks):
    check_dispatch(Case((0,) * num_ranks, 2 * num_ranks, 2))


def test_rows_equal_to_the_sentinel():
    """16 bytes of ones mark an empty packet: rows of them still arrive, as other NaNs."""
    case = Case((5, 4), 4, 3, hidden=1000)
    sent = case.inputs()
    sent[0].x[1:3] = torch.tensor(-1, dtype=torch.int16).view(torch.bfloat16)
    sent[1].x[0, 8:16] = torch.tensor(-1, dtype=torch.int16).view(torch.bfloat16)
    group = VirtualGroup.of(case)
    call = DispatchCall(group, case, sent=sent)
    call.run()
    call.check()
    group.check_clear()


@pytest.mark.parametrize("blocks", [2, 9])
def test_any_number_of_blocks(blocks):
    """One block for rows beside the leader, and more blocks than tokens."""
    case = Case((21, 4), 6, 4, hidden=520)
    group = VirtualGroup.of(case)
    for seed in range(3):
        call = DispatchCall(group, replace(case, seed=seed))
        call.begin(BOTH)
        size = (blocks, 32 if blocks == 2 else THREADS, call.sizes[2])
        group.ranks.run(decode_dispatch_spec.SPEC, [call.fields(rank) for rank in range(2)], size, call.config)
        call.check()
        group.check_clear()


# ---------------------------------------------------------------------- call after call


def varied(num_ranks: int, seed: int, *, weights: bool = True) -> Case:
    """Return another case of the same sizes."""
    tokens = tuple((7 * seed + 5 * rank) % 13 for rank in range(num_ranks))
    return Case(tokens, 4 * num_ranks, 5, hidden=272, routing=ROUTINGS[seed % 3], seed=seed, weights=weights)


SHAPE = MoeShape(4 * 8, 5, 272, 12)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_many_calls_at_once(num_ranks):
    """Twelve calls are queued before the first has ended: acknowledgements keep fast ranks from overwriting buffers."""
    group = VirtualGroup(decode_ranks(num_ranks), replace(SHAPE, num_experts=4 * num_ranks))
    calls = [DispatchCall(group, varied(num_ranks, seed), SCALES[seed % 2]) for seed in range(12)]
    launch_back_to_back(calls)


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_sends_before_their_receives(num_ranks):
    """Separate launches send and receive; at most two sends are not yet received."""
    group = VirtualGroup(decode_ranks(num_ranks), replace(SHAPE, num_experts=4 * num_ranks))
    calls = [DispatchCall(group, varied(num_ranks, seed)) for seed in range(9)]
    calls[0].run(SEND)
    for outputs in calls[0].outputs:
        assert (outputs["out"].cpu() == POISON).all(), "a launch that only sends has received"
    for before, call in itertools.pairwise(calls):
        call.run(SEND)
        before.run(RECEIVE)
        before.check()
    calls[-1].run(RECEIVE)
    calls[-1].check()
    group.check_clear()


def test_sends_and_receives_back_to_back():
    """The same without waiting in between, mixed with launches that do both."""
    group = VirtualGroup(decode_ranks(3), replace(SHAPE, num_experts=12))
    calls = [DispatchCall(group, varied(3, seed), counts=True) for seed in range(14)]
    sends_and_receives_back_to_back(calls)


def test_receives_in_another_order():
    """The second of two calls may be received first."""
    group = VirtualGroup(decode_ranks(2), replace(SHAPE, num_experts=8))
    for seed in range(0, 8, 2):
        first, second = (DispatchCall(group, varied(2, seed + i)) for i in (0, 1))
        first.run(SEND)
        second.run(SEND)
        second.run(RECEIVE)
        first.run(RECEIVE)
        first.check()
        second.check()
        group.check_clear()


@pytest.mark.parametrize("before", [None, -3, -2])
def test_a_rank_waits_until_its_peer_has_received(before):
    """The third send would overwrite the first: it waits until all peers have acknowledged the first.

    Also where epochs wrap around: 0 and the numbers after it are epochs like others.
    """
    group = VirtualGroup(decode_ranks(2) if before is None else Ranks(2), replace(SHAPE, num_experts=8))
    if before is not None:
        group.start_after(before)
    first, second, third = (DispatchCall(group, varied(2, seed), counts=True) for seed in (1, 2, 3))
    third_send_waits_for_acks(first, second, third)
    assert third.wait_ns[0][1] > 0, "rank 0 has waited for rank 1, but wait_ns does not count it"


@pytest.mark.parametrize("late", [0, 2])
def test_a_late_rank_is_waited_for_and_the_time_counted(late):
    """Ranks that wait add the time to the entry of the late rank."""
    case = varied(3, 4)
    group = VirtualGroup.of(case)
    call = DispatchCall(group, case, counts=True)
    group.ranks.delay(late, 40)
    call.run()
    call.check()
    for rank in range(3):
        waited = call.wait_ns[rank].tolist()
        assert waited[rank] == 0, "a rank waited for itself"
        if rank != late:
            assert waited[late] > 10_000_000, waited


def test_counters_add_up():
    group = VirtualGroup(decode_ranks(2), replace(SHAPE, num_experts=8))
    first, second = (DispatchCall(group, varied(2, seed), counts=True) for seed in (3, 4))
    second.received = first.received
    first.run()
    first.check()
    second.launch(BOTH)
    group.ranks.wait()
    for rank in range(2):
        counts = [torch.tensor(call.oracle.expert_counts(rank)) for call in (first, second)]
        assert first.received[rank].tolist() == (counts[0] + counts[1] + 5).tolist()


# ---------------------------------------------------------------------- bad indices


@pytest.mark.parametrize("index", [12, -2, 13_000, 1 << 40, -(1 << 40)])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_bad_index_sends_nothing(index, prepared, monkeypatch):
    """The index is reported, the peers wait, and the call can be repeated with a valid routing."""
    if prepared:
        monkeypatch.setattr(decode_dispatch_spec, "CHOICES_BYTES", 0)
    case = Case((9, 7, 8), 12, 5, hidden=264, routing="half_dropped")
    group = VirtualGroup.of(case)
    good = DispatchCall(group, case, prepared=prepared)
    sent = list(case.inputs())
    spoilt = sent[1].topk_idx.clone()
    spoilt[3, 2] = index
    spoilt[5, 0] = 99  # not the first bad slot
    sent[1] = replace(sent[1], topk_idx=spoilt)
    bad = DispatchCall(group, case, sent=(sent[0], replace(sent[1], topk_idx=sent[1].topk_idx.clamp(-1, 11)), sent[2]))
    bad._on_device[1][1] = group.ranks.on_device(spoilt)
    bad.prepared = prepared
    before = [block.cpu().clone() for block in group.blocks]
    group.ranks.call += 1
    bad.launch(only=(1,))
    group.ranks.wait(1)
    group.sends[DISPATCH] -= 1
    record = group.ranks.record(1)
    assert record is not None
    seen = max(-(1 << 31), min(index, (1 << 31) - 1)) & 0xFFFFFFFF
    assert (record.code, record.call) == (Fault.bad_routing, group.ranks.call)
    assert (record.peer, record.word, record.seen, record.expected) == (2, 3, seen, 12)
    for rank, block in enumerate(group.blocks):
        assert block.cpu().equal(before[rank]), f"something was sent to rank {rank}"
    assert group.ranks.failed() == [0, 0, 0]
    assert bad.outputs[1]["table"].cpu().view(torch.int32)[ALIVE] == 0
    # Later kernels along this plan are no-ops.
    bad.launch(RECEIVE, only=(1,))
    group.ranks.wait()
    assert (bad.outputs[1]["out"].cpu() == POISON).all()
    good.run()
    good.check()
    group.check_clear()


def test_peers_of_a_bad_index_wait_for_the_next_try():
    case = Case((9, 7), 8, 3, hidden=24)
    group = VirtualGroup.of(case)
    call = DispatchCall(group, case)
    right, spoilt = call._on_device[1][1], call._on_device[1][1].clone()
    spoilt[6, 2] = 8
    call._on_device[1][1] = spoilt
    call.launch()
    group.ranks.wait(1)
    record = group.ranks.record(1)
    assert record is not None
    assert record.code == Fault.bad_routing
    assert not group.ranks.streams[0].query(), "rank 0 did not wait"
    call._on_device[1][1] = right
    group.sends[DISPATCH] -= 1
    call.launch(only=(1,))
    group.ranks.wait()
    group.ranks.check_quiet()
    call.check()
    group.check_clear()


# ---------------------------------------------------------------------- late and lost ranks


def fresh(num_ranks: int, case: Case, calls: int) -> tuple[VirtualGroup, DispatchCall]:
    """Return new ranks that have made some calls, and the next call."""
    group = VirtualGroup(Ranks(num_ranks), case.shape)
    for seed in range(calls):
        call = DispatchCall(group, replace(case, seed=seed))
        call.run()
    group.ranks.call += 1
    return group, DispatchCall(group, replace(case, seed=calls))


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_rank_that_never_sends(calls):
    """The waiting rank reports its peer and the epochs seen and expected; calls of equal parity share their buffers."""
    group, call = fresh(2, Case((4, 3), 4, 2), calls)
    ranks = group.ranks
    call.launch(only=(0,), timeout_s=SHORT_S)
    ranks.wait()
    record = ranks.record(0)
    assert record is not None
    assert ranks.record(1) is None
    assert (record.code, record.call, record.peer, record.blamed) == (Fault.late_handshake, ranks.call, 1, 1)
    assert (record.seen, record.expected) == (max(calls - 1, 0), calls + 1)
    assert record.waited_ms >= SHORT_S * 1000
    assert ranks.failed() == [Fault.late_handshake, 0]
    assert int(ranks.words(1, "gave_up", 8, torch.int64)[0]) == Fault.late_handshake << 32 | 1
    # The late rank sees that its peer gave up.
    call.begin = lambda phases: None
    call.launch(only=(1,))
    ranks.wait()
    record = ranks.record(1)
    if record is not None:  # all that it needed had arrived: it did not look for faults
        assert (record.code, record.peer, record.word, record.blamed) == (
            Fault.peer_gave_up,
            0,
            Fault.late_handshake,
            1,
        )


def test_after_a_fault_kernels_return_at_once():
    group, call = fresh(2, Case((4, 3), 4, 2), 1)
    call.launch(only=(0,), timeout_s=SHORT_S)
    group.ranks.wait()
    assert group.ranks.record(0) is not None
    after = DispatchCall(group, call.case)
    after.launch(only=(0,))
    group.ranks.wait()
    assert group.ranks.record(0) is None
    for block in after.outputs[0].values():
        assert (block.cpu() == POISON).all()


def test_rows_that_never_come():
    """Counts and notes arrive, a packet does not: the record holds the epoch of the row's note."""
    group, call = fresh(2, Case((4, 3), 4, 2, hidden=264, routing="all_to_expert_0"), 2)
    call.launch(SEND)
    group.ranks.wait()
    lose_packet(group, call, at=0, src=1)
    call.launch(RECEIVE, only=(0,), timeout_s=SHORT_S)
    group.ranks.wait()
    record = group.ranks.record(0)
    assert record is not None
    assert (record.code, record.peer, record.blamed) == (Fault.late_rows, 1, 1)
    assert (record.seen, record.expected) == (3, 3)


def lose_packet(group: VirtualGroup, call: DispatchCall, at: int, src: int) -> None:
    """Clear the last packet of a rank's first token before it is received."""
    workspace, R = group.workspaces[at], call.case.ranks
    start = workspace.rows_at + ((call.epoch & 1) * R + src) * group.sizes.rows + call.row_bytes - 16
    there = group.blocks[at].tensor[start : start + 16]
    assert (there != 0xFF).any(), "there is no packet"
    there.fill_(0xFF)


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_a_late_rank_is_masked(num_ranks):
    """The others continue without it, in this call and in later ones."""
    case = Case((6, 5, 7, 0, 1)[:num_ranks], 2 * num_ranks, 4, hidden=264)
    group, call = fresh(num_ranks, case, 1)
    there, all_ranks = [rank for rank in range(num_ranks) if rank != 1], (1 << num_ranks) - 1
    call.launch(only=there, mask_late=1, timeout_s=late_s(num_ranks))
    group.ranks.wait()
    group.ranks.check_quiet()
    assert not any(group.ranks.failed())
    check_without(call, gone=1, alive=all_ranks)
    after = DispatchCall(group, replace(case, seed=9))
    after.launch(only=there, mask_late=1)
    group.ranks.wait()
    group.ranks.check_quiet()
    check_without(after, gone=1, alive=all_ranks & ~2)


def check_without(call: DispatchCall, gone: int, alive: int) -> None:
    """Check the results as if rank ``gone`` had sent no tokens."""
    group, case = call.group, call.case
    sent = [
        replace(had, x=had.x[:0], topk_idx=had.topk_idx[:0], topk_weights=had.topk_weights[:0]) if rank == gone else had
        for rank, had in enumerate(call.inputs)
    ]
    expected = DispatchCall(group, case, sent=sent)
    expected.outputs, expected.epoch, expected.alive = call.outputs, call.epoch, alive
    expected.check([rank for rank in range(case.ranks) if rank != gone])
    for rank in range(case.ranks):
        if rank == gone:
            continue
        assert int(group.ranks.words(rank, "masked")) == 1 << gone
        assert group.masked[rank].tolist()[: case.ranks] == [int(peer == gone) for peer in range(case.ranks)]


def test_a_rank_whose_rows_are_lost_is_masked():
    case = Case((4, 3), 4, 2, hidden=264, routing="all_to_expert_0")
    group, call = fresh(2, case, 0)
    call.launch(SEND)
    group.ranks.wait()
    lose_packet(group, call, at=0, src=1)
    call.launch(RECEIVE, only=(0,), mask_late=1, timeout_s=SHORT_S)
    group.ranks.wait()
    group.ranks.check_quiet()
    assert int(group.ranks.words(0, "masked")) == 2
    own = call.outputs[0]["out"].cpu().reshape(-1, call.row_bytes)[:4]
    assert own.equal(call.rows_of(0)), "own rows were lost with the others"


@pytest.mark.parametrize("word", [0, 1, 13])
def test_a_peer_that_calls_something_else(word):
    """Signatures differ: both ranks report the word, or that the peer gave up because of it."""
    group, call = fresh(2, Case((4, 3), 4, 2), 1)
    handshakes = [{0: 6, 1: 4}, {0: 6, 1: 4, word: 99}]
    fields = [call.fields(rank, handshake=handshakes[rank]) for rank in range(2)]
    group.ranks.launch(decode_dispatch_spec.SPEC, fields, call.sizes, call.config)
    group.ranks.wait()
    for rank in range(2):
        record = group.ranks.record(rank)
        assert record is not None
        if record.code == Fault.peer_gave_up:
            assert (record.peer, record.word) == (1 - rank, Fault.mismatch)
            continue
        assert (record.code, record.peer, record.word) == (Fault.mismatch, 1 - rank, word)
        assert (record.seen, record.expected) == (handshakes[1 - rank].get(word, 0), handshakes[rank].get(word, 0))
    assert all(group.ranks.failed())


def test_a_peer_that_is_in_the_other_channel():
    """One rank dispatches, one combines: they report it long before the deadline."""
    case = Case((4, 3), 4, 2)
    group, call = fresh(2, case, 1)
    other = CombineCall(group, case)
    call.launch(only=(0,))
    other.launch(only=(1,))
    group.ranks.wait()
    for rank in range(2):
        record = group.ranks.record(rank)
        assert record is not None
        if record.code == Fault.peer_gave_up:
            assert record.word == Fault.mismatch
        else:
            assert (record.code, record.peer, record.word) == (Fault.mismatch, 1 - rank, 0)
            assert (record.seen, record.expected) == ((7, 6) if rank == 0 else (6, 7))
