"""The kernel dispatch_fused alone, on virtual ranks: the bytes of the three kernels, beside them, and aborted calls."""

import pytest
import torch

from support.plan_checks import choices_of, form_for
from support.virtual_dispatch import Payload, Scales
from support.virtual_fused import Whole
from support.virtual_plan import NO_LIMIT, Expected, Form
from support.virtual_ranks import CONTROL_BLOCK_OFFSETS, Ranks, ranks_of
from tokenferry.kernels.control_block import MAX_EXPERTS, Fault
from tokenferry.kernels.dispatch_fused import spec as fused_spec
from tokenferry.testing.cases import ROUTINGS, Case

TOKENS = (129, 0, 300, 1, 128, 8, 64, 257)
LAYOUTS = ("rows", "experts", "masked")
PAYLOADS = (
    Payload(256, Scales(4, torch.float32), weights=True),
    Payload(48, Scales(1, torch.float32), weights=True, idx_dtype=torch.int32),
    Payload(7168, Scales(56, torch.int32, "columns")),
    Payload(8208, Scales(3, torch.float64, "columns"), weights=True, idx_dtype=torch.int32),  # two pieces
)

by_layout = pytest.mark.parametrize("layout", LAYOUTS)


def inputs(case):
    return [one.topk_idx for one in case.inputs()]


def whole(ranks, topk_idx, experts, layout="rows", payload=PAYLOADS[0], seed=0):
    return Whole(ranks, topk_idx, experts, form_for(layout, choices_of(topk_idx), experts, 4), payload, seed)


def finish(ranks):
    ranks.wait()
    ranks.check_quiet()


def run(ranks, topk_idx, experts, layout="rows", payload=PAYLOADS[0], what="", num_sms=4):
    one = whole(ranks, topk_idx, experts, layout, payload)
    ranks.call += 1
    one.fused(num_sms=num_sms)
    finish(ranks)
    one.check(what)
    return one


# ---------------------------------------------------------------------- right results


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing(num_ranks, routing):
    """In every layout, with other sizes, numbers of tokens and kinds of rows for each."""
    i = ROUTINGS.index(routing) + num_ranks
    payload = PAYLOADS[i % (4 if num_ranks < 8 else 2)]
    tokens = tuple(TOKENS[(i + rank) % 8] for rank in range(num_ranks))
    experts, top_k = num_ranks * (2, 1, 8, 5)[i % 4], (2, 8, 1, 33)[i % 4]
    case = Case(tokens, experts, top_k, idx_dtype=payload.idx_dtype, routing=routing, seed=i)
    ranks = ranks_of(num_ranks)
    for layout in LAYOUTS:
        ranks.reset()
        run(ranks, inputs(case), experts, layout, payload, f"{case} {layout}")


@by_layout
def test_the_same_bytes_as_three_kernels(layout):
    """Also the words that only kernels read: the table and the bases."""
    ranks = ranks_of(3)
    topk_idx = inputs(Case((140, 0, 37), 12, 4, routing="repeated"))
    found = []
    for fused in (False, True):
        ranks.reset()
        one = whole(ranks, topk_idx, 12, layout)
        ranks.call += 1
        one.fused() if fused else one.three()
        finish(ranks)
        found.append([one.words(rank) for rank in range(3)])
    for rank in range(3):
        three, one = found[0][rank], found[1][rank]
        call = three.pop("host")[4:], one.pop("host")[4:]  # behind the number of the call
        assert call[0].equal(call[1])
        for name, want in three.items():
            assert one[name].equal(want), f"rank {rank}: {name}"


@pytest.mark.parametrize("num_sms", [3, 4, 7])
def test_any_number_of_blocks(num_sms):
    """As many as units, so that block 0 takes tokens, one more, and several for each unit."""
    ranks = ranks_of(2)
    run(ranks, inputs(Case((300, 5), 4, 2, routing="even")), 4, num_sms=num_sms)


def test_one_block():
    ranks = ranks_of(2)
    run(ranks, inputs(Case((128, 3), 4, 2, routing="half_dropped")), 4, "experts", num_sms=1)


def test_no_rank_has_tokens():
    ranks = ranks_of(3)
    for layout in LAYOUTS:
        run(ranks, inputs(Case((0, 0, 0), 6, 2)), 6, layout)


def test_most_tokens_experts_and_choices():
    """A limit of each: blocks go around their rings several times."""
    ranks = ranks_of(2)
    run(ranks, inputs(Case((fused_spec.MAX_TOKENS, 300), 8, 2, routing="even")), 8, num_sms=9)
    ranks.reset()
    case = Case((20, 3), MAX_EXPERTS, 64, routing="half_dropped")
    run(ranks, inputs(case), MAX_EXPERTS, "experts", Payload(64, weights=True))


def test_numbers_of_blocks():
    """None where the kernel does not do: then there are three kernels."""
    assert [fused_spec.num_blocks(T, 24) for T in (0, 1, 8, 128, 512, 513)] == [1, 2, 9, 24, 24, 0]
    assert [fused_spec.num_blocks(T, 2) for T in (1, 256, 257)] == [2, 2, 0]


# ---------------------------------------------------------------------- among other calls


def test_call_after_call_with_a_late_rank():
    """One epoch for each call; handshakes alternate between two halves."""
    ranks = ranks_of(3)
    topk_idx = inputs(Case((31, 4, 18), 6, 3, routing="repeated"))
    epochs = ranks.epochs()
    for i in range(8):
        ranks.reset()
        one = whole(ranks, topk_idx, 6, LAYOUTS[i % 3], PAYLOADS[0], seed=i)
        ranks.call += 1
        ranks.delay(i % 3, 3)
        one.fused()
        finish(ranks)
        one.check(f"call {i}")
    assert ranks.epochs() == [epoch + 8 for epoch in epochs]


@pytest.mark.parametrize("large", [(0,), (2,), (0, 1), (0, 1, 2)])
def test_some_ranks_run_three_kernels(large):
    """Those with more tokens, say. All ranks then count two epochs; a late rank, and calls of one kernel in between."""
    ranks = ranks_of(3)
    small = tuple(rank for rank in range(3) if rank not in large)
    topk_idx = inputs(Case((150, 9, 60), 6, 3, routing="half_dropped"))
    epochs = ranks.epochs()
    for i in range(4):
        ranks.reset()
        one = whole(ranks, topk_idx, 6, LAYOUTS[i % 3], PAYLOADS[0], seed=i)
        ranks.call += 1
        ranks.delay(i % 3, 3)
        one.three(only=large)
        one.fused(only=small)
        finish(ranks)
        one.check(f"call {i}")
        run(ranks, topk_idx, 6, "rows", PAYLOADS[0], f"behind call {i}")
    assert ranks.epochs() == [epoch + 12 for epoch in epochs]


def test_a_peer_of_three_kernels_that_does_not_go_on():
    """It has exchanged counts, but never launches dispatch: what does not come is its handshake of the next epoch."""
    ranks = Ranks(2)
    one = whole(ranks, inputs(Case((9, 150), 4, 2)), 4)
    ranks.call += 1
    one.planner.notify(only=(1,), handshake=one.signature)
    one.fused(only=(0,), timeout_s=2)
    ranks.wait()
    record = ranks.record(0)
    assert record is not None
    assert (record.code, record.peer, record.blamed) == (Fault.late_handshake, 1, 1)
    assert (record.seen, record.expected) == (0, 2), "handshakes of every second epoch lie in the same place"
    assert one.planner.tables[0].dst_counts.tolist() == one.expected.dst_counts(0), "the plan was made"


def test_a_rank_that_takes_no_part_counts_for_nothing():
    """Rank 1 is masked: it does not launch, no rank waits for it, and its words in control blocks are not read."""
    ranks = Ranks(3)
    topk_idx = inputs(Case((130, 20, 60), 6, 3, routing="half_dropped"))
    run(ranks, topk_idx, 6)
    without = [torch.where(one // 2 == 1, -1, one) for one in topk_idx]
    without[1] = without[1][:0]
    one = whole(ranks, without, 6)
    ranks.call += 1
    one.fused(only=(0, 2), alive=0b101)
    finish(ranks)
    for rank in (0, 2):
        one.delivery.check_rank(rank)
    assert ranks.epochs() == [2, 1, 2]


# ---------------------------------------------------------------------- aborted calls


def check_aborted(one, rank):
    """Check that kernels will skip the plan, and that the host has seen no call number."""
    t, R = one.planner.tables[rank], one.ranks.num_ranks
    assert t.dst_counts.tolist() == t.src_counts.tolist() == [-1] * R
    assert not t.expert_counts.any()
    assert t.host.unique().tolist() == [-1], "the host has got counts"


@by_layout
def test_a_bad_index_stops_its_rank_only_and_the_call_can_be_made_again(layout):
    ranks = ranks_of(3)
    good = inputs(Case((150, 200, 9), 6, 8, routing="half_dropped"))
    bad = [good[0], good[1].clone(), good[2]]
    for token, slot in ((131, 2), (195, 2), (132, 1), (139, 0)):  # the least one is recorded
        bad[1][token, slot] = 6
    form = form_for(layout, choices_of(good), 6, 4)
    one = Whole(ranks, good, 6, form, PAYLOADS[0])
    wrong = Whole(ranks, bad, 6, form, PAYLOADS[0], room_for=good)
    epochs = ranks.epochs()
    ranks.call += 1
    one.fused(only=(0, 2))
    wrong.fused(only=(1,))
    ranks.wait(1)
    record = ranks.record(1)
    one.fused(only=(1,))
    finish(ranks)
    assert record is not None
    assert (record.code, record.call, record.word, record.peer) == (Fault.bad_routing, ranks.call, 131, 2)
    assert (record.seen, record.expected) == (6, 6)
    check_aborted(wrong, 1)
    wrong.check_moved_nothing()
    assert ranks.epochs() == [epoch + 1 for epoch in epochs]
    one.check("the call that was made again")
    ranks.reset()
    run(ranks, good, 6, layout, what="the next call")


@pytest.mark.parametrize("three", [(), (1,)])
@by_layout
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_too_many_rows_for_a_tight_capacity_are_recorded_by_all(num_ranks, layout, three):
    """Also where another rank runs three kernels: it aborts in the same epoch."""
    three = [rank for rank in three if rank < num_ranks]
    ranks = ranks_of(num_ranks)
    topk_idx = inputs(Case((20, 3, 140)[:num_ranks], 2 * num_ranks, 2, routing="even", seed=4))
    for one in topk_idx:
        one[:, 0] = 2 * num_ranks - 1  # most rows go to the last rank
    free = form_for(layout, choices_of(topk_idx), 2 * num_ranks, 4)
    ends = Expected(choices_of(topk_idx), 2 * num_ranks, free).ends
    tight = Form(layout, free.alignment, free.capacity, row_limit=max(ends) - 1)
    one = Whole(ranks, topk_idx, 2 * num_ranks, tight, PAYLOADS[0])
    epochs = ranks.epochs()
    ranks.call += 1
    one.three(only=three)
    one.fused(only=[rank for rank in range(num_ranks) if rank not in three])
    ranks.wait()
    for rank in range(num_ranks):
        assert int(ranks.words(rank, "stopped")), "calls behind it in the stream would run"
        record = ranks.record(rank)
        assert record is not None, f"rank {rank} recorded nothing"
        assert (record.code, record.peer) == (Fault.overflow, ends.index(max(ends))), record
        assert (record.seen, record.expected) == (max(ends), max(ends) - 1), record
        check_aborted(one, rank)
    one.check_moved_nothing()
    assert not any(ranks.failed()), "an overflow broke the group"
    assert ranks.epochs() == [epoch + 1 for epoch in epochs]
    for row_limit in (max(ends), NO_LIMIT):
        ranks.reset()
        form = Form(layout, free.alignment, free.capacity, row_limit=row_limit)
        again = Whole(ranks, topk_idx, 2 * num_ranks, form, PAYLOADS[0])
        ranks.call += 1
        again.fused()
        finish(ranks)
        again.check("it fits")


def test_behind_an_aborted_call_nothing_runs():
    ranks = ranks_of(2)
    topk_idx = inputs(Case((9, 150), 4, 2))
    epochs = ranks.epochs()
    one = whole(ranks, topk_idx, 4)
    for rank in range(2):
        ranks.words(rank, "stopped").fill_(1)
    ranks.call += 1
    one.fused()
    finish(ranks)
    for rank in range(2):
        check_aborted(one, rank)
        ranks.words(rank, "stopped").zero_()
    one.check_moved_nothing()
    assert ranks.epochs() == epochs


def test_the_word_of_block_0_is_in_the_control_block_once():
    """Its epoch makes it new for each plan, so nothing clears it."""
    ranks = ranks_of(2)
    run(ranks, inputs(Case((9, 150), 4, 2)), 4)
    assert CONTROL_BLOCK_OFFSETS["planned"] % 8 == 0
    for rank in range(2):
        assert int(ranks.words(rank, "planned", dtype=torch.int64)) == ranks.epochs()[rank] << 32 | 1
