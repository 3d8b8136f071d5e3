"""Jobs of dispatch, redispatch and combine; processes on every backend run them, and threads on the emulator."""

import gc

import pytest
import torch

from support.pairs import Pair
from support.throughput import (
    COMBINES,
    Deal,
    all_options,
    check_combine,
    check_quantized,
    check_redispatch,
    check_round_trip,
    needed,
    oracle_for,
    quantized,
    routing_of,
)
from tokenferry import CapacityError, DispatchOptions, Layout, MoeShape, Quantized, Routing
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import same_bits


def cases(ranks: int) -> list[Case]:
    """Return cases of every kind of routing, sizes and dtypes; T differs between ranks and is 0 on some."""
    uneven = (6, 0, 9, 3, 1, 4, 0, 7)[:ranks]
    return [
        Case(uneven, 2 * ranks, 2),
        Case(uneven[::-1], 3 * ranks, 4, hidden=36, dtype=torch.float32, idx_dtype=torch.int32, routing="repeated"),
        Case(uneven, 2 * ranks, 8, hidden=2, dtype=torch.float64, routing="half_dropped", weights=False),
        Case((4,) * ranks, ranks, 1, hidden=8, dtype=torch.float16, routing="one_rank_idle"),
        Case((3,) * ranks, 2 * ranks, 3, routing="all_to_expert_0", seed=1),
        Case(uneven, 4 * ranks, 2, idx_dtype=torch.int32, routing="nothing"),
        Case((0,) * ranks, 2 * ranks, 2, dtype=torch.float32),
        Case((2, 5, 1, 0, 3, 0, 2, 1)[:ranks], 8 * ranks, 64, hidden=72, idx_dtype=torch.int32, routing="repeated"),
        Case(uneven, 2 * ranks, 3, dtype=torch.float32, routing="own_rank"),
        Case((5,) * ranks, 4 * ranks, 7, dtype=torch.float16, routing="one_token_all"),
    ]


def round_trips(rank, pg, pair: Pair, ranks: int) -> None:
    with pair.open(pg, cases(ranks)[0].shape) as group:
        for i, case in enumerate(cases(ranks)):
            # Every case meets every layout; variants with free rows, without and with padding take turns, and so do
            # those of combine. All options meet all of these.
            for j, options in enumerate(all_options(case)[i % 3 :: 3]):
                check_round_trip(group.for_shape(case.shape), case, options, COMBINES[(i + j) % 2 :: 2])


def quantized_rows(rank, pg, pair: Pair, ranks: int) -> None:
    case = Case((6, 0, 9, 3, 1, 4, 0, 7)[:ranks], 2 * ranks, 3, routing="half_dropped")
    kinds = [
        # (bytes of data, its dtype, scales a row, their dtype)
        (16, torch.float8_e4m3fn, 1, torch.float32),
        (112, torch.uint8, 7, torch.int32),
        (48, torch.int8, 3, torch.uint8),
        (64, torch.float8_e5m2, 5, torch.bfloat16),
        (32, torch.int32, 0, torch.float32),
    ]
    with pair.open(pg, case.shape) as group:
        for options in (
            DispatchOptions(),
            DispatchOptions(Layout.EXPERTS, alignment=4, zero_padding=True),
            DispatchOptions(Layout.MASKED),
        ):
            deal = Deal(case, options, oracle_for(case, options), rank)
            for row_bytes, dtype, num_scales, scale_dtype in kinds:
                width = row_bytes // dtype.itemsize
                rows = [
                    quantized(
                        case, there, width=width, num_scales=num_scales, scale_dtype=scale_dtype, data_dtype=dtype
                    )
                    for there in range(ranks)
                ]
                sent = group.dispatch(rows[rank], routing_of(deal.oracle.sent[rank]), options=options)
                check_quantized(deal, sent, rows)
                check_quantized(deal, group.redispatch(rows[rank], sent.plan), rows)
            check_bf16_answers(group, deal, routing_of(deal.oracle.sent[rank]), rows[rank])


def check_bf16_answers(group, deal: Deal, routing, rows) -> None:
    """Combine bfloat16 rows along the plan of a dispatch of FP8 rows."""
    sent = group.dispatch(rows, routing, options=deal.options)
    like = group.redispatch(deal.oracle.sent[deal.rank].x, sent.plan)
    check_combine(group, deal, like, torch.bfloat16, 1, True, True)


def overflow(rank, pg, pair: Pair, ranks: int) -> None:
    # All tokens choose rank 0: with more than one rank, only that one overflows, and yet all must raise.
    case = Case((4,) * ranks, 2 * ranks, 3, routing="all_to_expert_0")
    enough = 4 * ranks
    with pair.open(pg, case.shape) as group:
        mine = case.inputs()[rank]
        for layout, counts in (
            (Layout.ROWS, "device"),
            (Layout.EXPERTS, "device"),
            (Layout.MASKED, "device"),
            (Layout.MASKED, "host"),
        ):
            assert needed(case, layout) == enough
            tight, large = DispatchOptions(layout, counts=counts, capacity=enough - 1), rf"(?s)(?=.*\b{enough}\b)"
            with pytest.raises(CapacityError, match=rf"{large}(?=.*\b{enough - 1}\b)") as caught:
                group.dispatch(mine.x, routing_of(mine), options=tight)
            assert (": an expert of " in str(caught.value)) == (layout is Layout.MASKED), "whose rows those are"
            del caught
            gc.collect()  # what the error's traceback holds: later calls must not use what this destroys
            check_round_trip(group, case, DispatchOptions(layout, counts=counts, capacity=enough))


def many_plans(rank, pg, pair: Pair) -> None:
    """Make ten dispatches first, then their combines, last plan first: plans outlive other calls."""
    steps = [Case((4, 7, 2), 6, 2, dtype=torch.float32, seed=seed) for seed in range(10)]
    with pair.open(pg, steps[0].shape) as group:
        made = []
        for case in steps:
            deal = Deal(case, DispatchOptions(Layout.EXPERTS), oracle_for(case, DispatchOptions(Layout.EXPERTS)), rank)
            mine = deal.oracle.sent[rank]
            made.append((deal, group.dispatch(mine.x, routing_of(mine), options=deal.options)))
        for deal, sent in reversed(made):
            same_bits(f"{deal} x", sent.x[deal.places], deal.oracle.x(rank))
            check_combine(group, deal, sent, None, 1, False, True)
            check_combine(group, deal, sent, None, 1, False, True)


def rows_that_begin_anywhere(rank, pg, pair: Pair) -> None:
    """Contiguous rows that are views of a part of a tensor, as those of a buffer for rows and scales are."""
    ranks = pg.size()
    with pair.open(pg, MoeShape(ranks, 1, 32, 4)) as group:
        where = Routing(torch.full((3, 1), (rank + 1) % ranks, dtype=torch.int64, device=group.device))
        for dtype in (torch.bfloat16, torch.float32):
            for start in (1, 3):
                flat = torch.arange(start + 3 * 32, device=group.device).to(dtype)
                x = flat[start:].view(3, 32)
                sent = group.dispatch(x, where)
                same_bits("dispatch", sent.x, x)
                same_bits("redispatch", group.redispatch(x, sent.plan).x, x)
                y = flat.clone()[start:].view(3, 32)
                same_bits("combine", group.combine(y, sent.plan).x, x)
                decoded = group.decode_dispatch(x.bfloat16(), where)
                same_bits("decode_dispatch", decoded.x[0, :3], x.bfloat16())
        flat = torch.arange(5 + 3 * 32, device=group.device).to(torch.uint8)
        rows = Quantized(flat[5:].view(3, 32), torch.ones(7, device=group.device, dtype=torch.float32)[1:].view(3, 2))
        sent = group.dispatch(rows, where)
        same_bits("quantized rows", sent.x.data, rows.data)
        same_bits("their scales", sent.x.scale, rows.scale)


def plans_in_other_views(rank, pg, pair: Pair) -> None:
    """Use plans in another view of their group, whose E, K and M differ: a plan has its own sizes."""
    case = Case((4, 7, 2), 6, 2, dtype=torch.float32)
    with pair.open(pg, case.shape) as group:
        other = group.for_shape(MoeShape(3, 5, case.hidden, max_tokens=1))
        for options in all_options(case):
            deal = Deal(case, options, oracle_for(case, options), rank)
            mine = deal.oracle.sent[rank]
            sent = group.dispatch(mine.x, routing_of(mine), options=options)
            check_combine(other, deal, sent, None, 1, False, True)
            check_redispatch(other, deal, sent)
