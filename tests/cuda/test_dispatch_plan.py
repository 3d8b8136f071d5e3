"""The kernels dispatch_notify and dispatch_assign alone, on virtual ranks: whole plans, and aborted ones."""

import pytest
import torch

from support.plan_checks import check, check_counts, choices_of, form_for
from support.virtual_plan import NO_LIMIT, Expected, Form, Planner
from support.virtual_ranks import POISON, Ranks, ranks_of
from tokenferry.kernels.control_block import (
    HOST_EXPERTS_WORD,
    HOST_MOST_WORD,
    HOST_UNITS_WORD,
    MAX_COUNTS,
    MAX_RANKS,
    Fault,
)
from tokenferry.testing.cases import ROUTINGS, Case
from tokenferry.testing.oracle import Oracle

RANKS = (1, 2, 3, 4, 5, 8)
TOKENS = (129, 0, 1000, 1, 128, 127, 63, 257)
"""A unit has 128."""
LOCAL_EXPERTS = (2, 1, 3, 8, 32, 5, 16, 4)
TOP_K = (2, 1, 8, 7, 64, 3, 4, 33)
ALIGNMENTS = (8, 1, 3, 128)

by_ranks = pytest.mark.parametrize("num_ranks", RANKS)
by_layout = pytest.mark.parametrize("layout", ["rows", "experts", "masked"])


def plan(num_ranks, topk_idx, num_experts, form, what=""):
    planner = Planner(ranks_of(num_ranks), topk_idx, num_experts, form)
    planner.run()
    expected = Expected(choices_of(topk_idx), num_experts, form)
    check(planner, expected, what)
    return planner, expected


# ---------------------------------------------------------------------- right plans


def test_the_worked_example():
    """The examples in the heads of both kernels."""
    topk_idx = [torch.tensor([[0, 1], [1, 3]])] * 2
    planner, _ = plan(2, topk_idx, 4, Form("rows"))
    t = planner.tables[1]
    half = planner.ranks.epochs()[1] & 1
    published = planner.ranks.words(1, "counts", 4, torch.int64, half * MAX_RANKS * MAX_COUNTS)
    assert (published & 0xFFFFFFFF).tolist() == [1, 2, 0, 1], "rank 0's rows for each expert"
    assert t.expert_counts.tolist() == [0, 2]
    assert t.dst_counts.tolist() == [2, 1]
    assert t.places[:, :2].tolist() == [[2, -1], [3, 1]]


@by_ranks
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing(num_ranks, routing):
    """In every layout, with other sizes for each number of ranks and each routing."""
    i = ROUTINGS.index(routing) + RANKS.index(num_ranks)
    case = Case(
        tuple(TOKENS[(i + rank) % 8] for rank in range(num_ranks)),
        num_ranks * LOCAL_EXPERTS[i % 8],
        TOP_K[ROUTINGS.index(routing)],
        idx_dtype=(torch.int64, torch.int32)[i % 2],
        routing=routing,
        seed=i,
    )
    topk_idx = [one.topk_idx for one in case.inputs()]
    for layout in ("rows", "experts", "masked"):
        form = form_for(layout, choices_of(topk_idx), case.experts, ALIGNMENTS[i % 4])
        plan(num_ranks, topk_idx, case.experts, form, f"{case} {form}")


@by_ranks
@by_layout
def test_small_plans_are_those_of_the_oracle(num_ranks, layout):
    """Compare the reference of these tests with the oracle of the contract, and the kernels with both."""
    for seed, routing in enumerate(("even", "repeated", "half_dropped")):
        tokens = (7, 0, 12, 1, 5, 3, 0, 9)[:num_ranks]
        case = Case(tokens, 3 * num_ranks, 4, routing=routing, seed=seed)
        sent = case.inputs()
        form = form_for(layout, choices_of([one.topk_idx for one in sent]), case.experts, 4)
        oracle = Oracle(sent, case.experts, layout, alignment=form.alignment, capacity=form.capacity)
        _, expected = plan(num_ranks, [one.topk_idx for one in sent], case.experts, form, str(case))
        expected.check_against(oracle)


@pytest.mark.parametrize(
    ("num_ranks", "num_experts", "top_k", "dtype"),
    [(1, 4096, 64, torch.int64), (8, 4096, 64, torch.int32), (5, 4095, 7, torch.int64), (3, 999, 33, torch.int32)],
)
@by_layout
def test_most_experts_and_choices(num_ranks, num_experts, top_k, dtype, layout):
    tokens = (130, 3, 0, 129, 1, 64, 2, 5)[:num_ranks]
    case = Case(tokens, num_experts, top_k, idx_dtype=dtype, routing="half_dropped")
    topk_idx = [one.topk_idx for one in case.inputs()]
    plan(num_ranks, topk_idx, num_experts, form_for(layout, choices_of(topk_idx), num_experts, 2), str(case))


def test_many_units_on_few_blocks():
    """More units than the sums of columns take at a time, and many for each block."""
    case = Case((16 * 128 * 2 + 1, 300), 4, 2, routing="half_dropped")
    topk_idx = [one.topk_idx for one in case.inputs()]
    for layout in ("rows", "experts"):
        plan(2, topk_idx, 4, Form(layout), layout)


def test_the_same_places_every_time():
    case = Case((400, 129, 257), 12, 4, routing="repeated")
    topk_idx = [one.topk_idx for one in case.inputs()]
    form = Form("experts", alignment=8)
    first, _ = plan(3, topk_idx, 12, form)
    for late in range(3):
        first.ranks.delay(late, 3)
        again = Planner(ranks_of(3), topk_idx, 12, form)
        again.run()
        for rank in range(3):
            assert again.tables[rank].places.equal(first.tables[rank].places), f"rank {late} late: places of {rank}"


@pytest.mark.parametrize(
    ("num_ranks", "segments", "local"), [(1, 4, 3), (2, 2, 4), (2, 3, 1), (4, 2, 8), (8, 5, 2), (3, 32, 2)]
)
@by_layout
def test_ranks_that_act_for_several_sources(num_ranks, segments, local, layout):
    """The routing of each rank has segments: rows come by segment, then by rank, then by token."""
    num_experts, tokens = local * num_ranks, (300, 0, 129, 7, 384, 1, 128, 255)
    units = 3 if segments < 10 else 1
    for i, routing in enumerate(("even", "repeated", "half_dropped")):
        counts = [min(tokens[(i + 3 * s) % 8], units * 128) for s in range(segments * num_ranks)]
        case = Case(
            tuple(counts), num_experts * segments, 4, idx_dtype=(torch.int64, torch.int32)[i % 2], routing=routing
        )
        # The experts of one node; the others are on other nodes.
        chosen = [torch.where(one.topk_idx < num_experts, one.topk_idx, -1) for one in case.inputs()]
        padded = [torch.cat([one, one.new_full((units * 128 - len(one), 4), -1)]) for one in chosen]
        topk_idx = [torch.cat(padded[rank::num_ranks]) for rank in range(num_ranks)]
        choices = choices_of(padded)
        form = form_for(layout, choices, num_experts, ALIGNMENTS[i], segments)
        planner = Planner(ranks_of(num_ranks), topk_idx, num_experts, form, segments)
        planner.run()
        check(planner, Expected(choices, num_experts, form, segments), f"{segments} x {num_ranks} {routing} {form}")
        for sizes, lengths in zip(planner.sizes, planner.lengths, strict=True):
            assert sizes[:segments].tolist() == lengths
            assert sizes[2 * segments].item() == 128 * planner.longest
            rest = torch.cat([sizes[segments : 2 * segments], sizes[2 * segments + 1 :]])
            assert bool((rest.cpu().view(torch.uint8) == POISON).all()), "too much is written"


def test_a_rank_that_takes_no_part_counts_for_nothing():
    """Rank 1 is masked: it does not launch, no rank waits for it, and its words in control blocks are not read."""
    ranks = Ranks(3)
    case = Case((130, 20, 60), 6, 3, routing="half_dropped")
    topk_idx = [one.topk_idx for one in case.inputs()]
    before = Planner(ranks, topk_idx, 6, Form("rows"))
    before.run()
    check(before, Expected(choices_of(topk_idx), 6, Form("rows")))
    without = [torch.where(one // 2 == 1, -1, one) for one in topk_idx]
    without[1] = without[1][:0]
    for layout in ("rows", "experts"):
        planner = Planner(ranks, without, 6, Form(layout))
        ranks.call += 1
        planner.notify(only=(0, 2), alive=0b101)
        ranks.wait()
        ranks.check_quiet()
        expected = Expected([*choices_of(without)], 6, Form(layout))
        for rank in (0, 2):
            check_counts(planner, expected, rank, f"{layout} rank {rank}")
    assert ranks.epochs() == [3, 1, 3]


# ---------------------------------------------------------------------- aborted calls


def check_aborted(planner, rank):
    """Check that kernels will skip the plan, and that the host has seen no call number."""
    t = planner.tables[rank]
    R = planner.ranks.num_ranks
    assert t.dst_counts.tolist() == [-1] * R
    assert t.src_counts.tolist() == [-1] * R
    assert not t.expert_counts.any()
    assert t.host.unique().tolist() == [-1], "the host has got counts"


def check_unassigned(planner):
    """Check that dispatch_assign writes nothing along an aborted plan."""
    planner.assign()
    planner.ranks.wait()
    for t in planner.tables:
        for tensor in (t.places, t.dst_token):
            assert (tensor.view(torch.uint8) == POISON).all(), "dispatch_assign wrote along an aborted plan"


BAD = (
    # (index, index in the record)
    (6, 6),
    (-2, -2),
    (1 << 40, (1 << 31) - 1),
    (-(1 << 40), -(1 << 31)),
)


@pytest.mark.parametrize(
    ("dtype", "index", "recorded"),
    [
        pytest.param(dtype, *case, id=f"{str(dtype)[6:]}-{case[0]}")
        for dtype in (torch.int32, torch.int64)
        for case in BAD
        if torch.iinfo(dtype).min <= case[0] <= torch.iinfo(dtype).max
    ],
)
def test_a_bad_index_stops_its_rank_only_and_the_call_can_be_made_again(index, recorded, dtype):
    ranks = ranks_of(3)
    case = Case((150, 200, 9), 6, 8, idx_dtype=dtype, routing="half_dropped")
    good = [one.topk_idx for one in case.inputs()]
    bad = [good[0], good[1].clone(), good[2]]
    # The least one is recorded: of a thread that sees two, of a block, and of all blocks.
    for token, slot in ((131, 2), (195, 2), (132, 1), (139, 0)):
        bad[1][token, slot] = index
    form = Form("experts", alignment=4)
    planner, retry = Planner(ranks, bad, 6, form), Planner(ranks, good, 6, form)
    epochs = ranks.epochs()
    ranks.call += 1
    planner.notify()
    ranks.wait(1)
    record = ranks.record(1)
    # Only the repeated call until the peers have synchronised with it: they wait on the device.
    retry.notify(only=(1,))
    ranks.wait()
    assert record is not None
    assert (record.code, record.call, record.word, record.peer) == (Fault.bad_routing, ranks.call, 131, 2)
    assert (record.seen, record.expected) == (recorded & 0xFFFFFFFF, 6)
    ranks.check_quiet()
    check_aborted(planner, 1)
    assert ranks.epochs() == [epoch + 1 for epoch in epochs]
    expected = Expected(choices_of(good), 6, form)
    for rank, done in ((0, planner), (1, retry), (2, planner)):
        check_counts(done, expected, rank, f"rank {rank}")
    plan(3, good, 6, form, "the next call")


def test_a_bad_index_on_every_rank():
    ranks = ranks_of(2)
    good = [one.topk_idx for one in Case((5, 300), 4, 2).inputs()]
    bad = [one.clone() for one in good]
    bad[0][4, 1], bad[1][299, 0] = 4, -7
    planner = Planner(ranks, bad, 4, Form("rows"))
    epochs = ranks.epochs()
    ranks.call += 1
    planner.notify()
    ranks.wait()
    for rank, where in ((0, (4, 1)), (1, (299, 0))):
        record = ranks.record(rank)
        assert record is not None
        assert (record.code, record.word, record.peer) == (Fault.bad_routing, *where)
        check_aborted(planner, rank)
    assert ranks.epochs() == epochs, "a rank went on to the next epoch alone"
    check_unassigned(planner)
    plan(2, good, 4, Form("rows"), "after bad indices")


@by_layout
@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_too_many_rows_for_a_tight_capacity_are_recorded_by_all(num_ranks, layout):
    ranks = ranks_of(num_ranks)
    case = Case((20, 3, 9, 0, 140, 1, 2, 4)[:num_ranks], 2 * num_ranks, 2, routing="even", seed=4)
    topk_idx = [one.topk_idx for one in case.inputs()]
    for one in topk_idx:
        one[:, 0] = 2 * num_ranks - 1  # most rows go to the last rank
    free = form_for(layout, choices_of(topk_idx), case.experts, 4)
    ends = Expected(choices_of(topk_idx), case.experts, free).ends
    worst = ends.index(max(ends))
    tight = Form(layout, free.alignment, free.capacity, row_limit=max(ends) - 1)
    planner = Planner(ranks, topk_idx, case.experts, tight)
    ranks.call += 1
    planner.notify()
    ranks.wait()
    for rank in range(num_ranks):
        assert int(ranks.words(rank, "stopped")), "calls behind it in the stream would run"
        record = ranks.record(rank)
        assert record is not None, f"rank {rank} recorded nothing"
        assert (record.code, record.call, record.peer) == (Fault.overflow, ranks.call, worst), record
        assert (record.seen, record.expected) == (max(ends), max(ends) - 1), record
        check_aborted(planner, rank)
    check_unassigned(planner)
    assert not any(ranks.failed()), "an overflow broke the group"
    for row_limit in (max(ends), NO_LIMIT):
        plan(
            num_ranks,
            topk_idx,
            case.experts,
            Form(layout, free.alignment, free.capacity, row_limit=row_limit),
            "it fits",
        )


def test_host_words_are_where_the_host_looks():
    """The call number, rows from and to eight ranks, rows of the fullest rank, units, then the experts."""
    assert (HOST_MOST_WORD, HOST_UNITS_WORD, HOST_EXPERTS_WORD) == (17, 18, 19)
