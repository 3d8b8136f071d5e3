"""decode_dispatch and decode_combine: casts, hooks, counters, numerics, masks."""

import random
import time
from dataclasses import replace

import pytest
import torch

from support.decode_jobs import (
    check_counters,
    counters,
    encodings,
    hooks_in_any_order,
    masked_encodings,
    not_finite,
    plans_in_other_views,
    rounds,
)
from support.decoding import Step, check_combined, check_received
from support.pairs import NODES, PAIRS, PLACES, Pair
from support.throughput import check_round_trip
from tokenferry import ArgumentError, DispatchOptions, ExpertGroup, MismatchError, MoeShape, Routing, Scale
from tokenferry.backends.cpu.exchange import Exchange
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import close

at_places = pytest.mark.parametrize(("pair", "ranks"), PLACES, ids=str)


@at_places
def test_rounds(run, pair, ranks):
    run(pair, ranks, rounds, ranks)


@at_places
def test_encodings(run, pair, ranks):
    run(pair, ranks, encodings, ranks)


def test_what_is_not_finite(run, pair):
    run(pair, 2, not_finite)


def test_encodings_without_masked_ranks(run, pair):
    need_masks(pair)
    run(pair, 3, masked_encodings)


def need_masks(pair: Pair) -> None:
    if pair.transport == "nccl":
        pytest.skip("masks across nodes need NVSHMEM")


def other_encodings(rank, pg, pair: Pair) -> str:
    case = Case((2, 3), 4, 2, hidden=128)
    step = Step(case, rank)
    with pair.open(pg, case.shape) as group:
        sent = group.decode_dispatch(step.mine().x, step.routing())
        with pytest.raises(MismatchError) as caught:
            group.decode_combine(sent.x, sent.plan, encoding=("fp8", "logfmt10")[rank])
    return str(caught.value)


def test_ranks_with_different_encodings_raise(run):
    texts = run(next(pair for pair in PAIRS if pair.transport == "shared_memory"), 2, other_encodings)
    assert "encoding is fp8 on rank 0 and logfmt10 on rank 1" in texts[0]


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_fewer_bytes_travel(monkeypatch, numerics):
    widths = []
    start = Exchange.start

    def watched(self, signature, outgoing, *args, **options):
        widths.append(outgoing.payload.sections.widths)
        return start(self, signature, outgoing, *args, **options)

    monkeypatch.setattr(Exchange, "start", watched)
    with ExpertGroup(None, MoeShape(2, 2, 512, 4), backend="cpu") as group:
        sent = group.decode_dispatch(
            torch.ones(2, 512).bfloat16(), Routing(torch.tensor([[0, 1], [1, -1]]), torch.ones(2, 2))
        )
        for encoding in ("same", "fp8", "logfmt10"):
            group.decode_combine(sent.x, sent.plan, numerics=numerics, encoding=encoding)
    assert widths[1:] == [(1024, 0), (512, 16), (640, 32)]


@pytest.mark.parametrize("encoding", ["FP8", "logfmt", None, 1])
def test_encodings_that_do_not_exist(encoding):
    with ExpertGroup(None, MoeShape(2, 2, 128, 4), backend="cpu") as group:
        sent = group.decode_dispatch(torch.ones(1, 128), Routing(torch.tensor([[0, 1]]), torch.ones(1, 2)))
        with pytest.raises(ArgumentError, match='encoding: expected one of "same", "fp8", "logfmt10", got'):
            group.decode_combine(sent.x, sent.plan, encoding=encoding)


@pytest.mark.parametrize("encoding", ["fp8", "logfmt10"])
def test_encodings_need_whole_groups(encoding):
    with ExpertGroup(None, MoeShape(2, 2, 192, 4), backend="cpu") as group:
        sent = group.decode_dispatch(torch.ones(1, 192), Routing(torch.tensor([[0, 1]]), torch.ones(1, 2)))
        with pytest.raises(
            ArgumentError, match=f"encoding: '{encoding}' works on groups of 128 columns, H=192 is not a multiple"
        ):
            group.decode_combine(sent.x, sent.plan, encoding=encoding)
        group.decode_combine(sent.x, sent.plan)


@pytest.mark.parametrize(("pair", "ranks"), [*((pair, 3) for pair in PAIRS), NODES[0]], ids=str)
def test_hooks_may_be_called_in_any_order_and_twice(run, pair, ranks):
    run(pair, ranks, hooks_in_any_order, ranks)


def test_plans_work_in_other_views_of_their_group(run, pair):
    run(pair, 3, plans_in_other_views)


def test_counters_are_added_to(run, pair):
    check_counters(run(pair, 3, counters, 3))


def many_tokens(rank, pg, pair: Pair) -> None:
    """Send more rows than any block that a backend may work through."""
    case = Case((300, 260), 4, 2, hidden=640, dtype=torch.float32)
    step = Step(case, rank)
    with pair.open(pg, case.shape) as group:
        sent = group.decode_dispatch(step.mine().x, step.routing())
        check_received(step, sent, None)
        for fast in (False, True):
            check_combined(group, step, sent, torch.float32, fast=fast, into=fast)


def test_many_tokens(run, pair):
    run(pair, 2, many_tokens)


def weights_later(rank, pg, pair: Pair) -> None:
    case = Case((3, 4), 4, 2, hidden=64, dtype=torch.float32)
    step = Step(case, rank)
    mine = step.mine()
    with pair.open(pg, case.shape) as group:
        sent = group.decode_dispatch(mine.x, Routing(mine.topk_idx))
        check_received(Step(replace(case, weights=False), rank), sent, None)
        later = replace(sent, plan=replace(sent.plan, topk_weights=mine.topk_weights))
        check_combined(group, step, later, torch.float32)


def test_weights_may_come_with_the_plan(run, pair):
    run(pair, 2, weights_later)


def other_calls_between(rank, pg, pair: Pair) -> None:
    """Use both families, two shapes and several live results on one group; a rank is late now and then."""
    one = Step(Case((3, 1, 2), 6, 2, hidden=128), rank)
    two = Step(Case((1, 5, 0), 3, 3, hidden=256, dtype=torch.float32, routing="repeated", seed=2), rank)
    pick = random.Random(rank)
    with pair.open(pg, one.case.shape) as group:
        views = [group.for_shape(step.case.shape) for step in (one, two)]
        for turn in range(3):
            if rank == turn:
                time.sleep(pick.random() * 0.02)
            sent = [v.decode_dispatch(s.mine().x, s.routing()) for v, s in zip(views, (one, two), strict=True)]
            check_round_trip(views[0], one.case, DispatchOptions())
            for view, step, got in zip(views, (one, two), sent, strict=True):
                check_received(step, got, None)
                check_combined(view, step, got, torch.bfloat16, fast=turn == 1, hook=turn == 2)


def test_families_and_shapes_share_a_group(run, pair):
    run(pair, 3, other_calls_between)


def masks(rank, pg, pair: Pair) -> None:
    """Ranks 0 and 1 go on without 2, and 2 without them; then all together again."""
    case = Case((3, 2, 4), 6, 3, hidden=128, dtype=torch.float32)
    away = frozenset({2}) if rank < 2 else frozenset({0, 1})
    with pair.open(pg, case.shape) as group:
        everyone, apart = Step(case, rank), Step(case, rank, away)
        for step in (everyone, apart, everyone, apart):
            for other in (0, 1, 2):
                if other != rank:
                    group.mask(other, masked=other in step.away)
            assert group.masked_ranks == step.away
            for fp8 in (None, Scale.FLOAT32):
                sent = group.decode_dispatch(step.mine().x, step.routing(), quantize=fp8, return_hook=fp8 is None)
                sent.hook()
                check_received(step, sent, fp8)
                check_combined(group, step, sent, torch.float32)
                check_combined(group, step, sent, torch.float32, fast=True, hook=True)
        for other in away:
            group.mask(other, masked=False)
        check_round_trip(group, case, DispatchOptions())


def test_masked_ranks_are_skipped_both_ways(run, pair):
    need_masks(pair)
    run(pair, 3, masks)


def fast_is_near(rank, pg, pair: Pair) -> None:
    """Compare "fast" with "exact": it may differ by one more rounding per rank."""
    case = Case((6, 5), 8, 6, hidden=256)
    step = Step(case, rank)
    with pair.open(pg, case.shape) as group:
        sent = group.decode_dispatch(step.mine().x, step.routing())
        exact = group.decode_combine(sent.x, sent.plan).x.float()
        fast = group.decode_combine(sent.x, sent.plan, numerics="fast").x.float()
    if pair.ranks_per_node == 1:
        assert torch.equal(exact, fast), "nodes of one rank sum before the encoding in either case"
    else:
        assert not torch.equal(exact, fast), "the same numbers: nothing was summed before the encoding"
    largest = float((case.inputs()[rank].topk_weights.abs().sum(1) * 1024).max())
    close("fast", fast, exact, rtol=2**-7, atol=largest * 2**-8)


def test_fast_differs_by_rounding_only(run, pair):
    run(pair, 2, fast_is_near)
