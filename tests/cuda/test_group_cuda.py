"""Groups on GPUs: how they are made, and sizes at the ends of what is promised."""

import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from support.numbered_rows import GIB, HIDDEN, STEP, check_numbered, heap_of, numbered
from support.pairs import NUM_GPUS, Pair
from support.throughput import (
    Deal,
    check_combine,
    check_delivered,
    check_plan,
    check_round_trip,
    oracle_for,
    routing_of,
)
from tokenferry import CapacityError, ConfigError, DispatchOptions, ExpertGroup, Layout, MoeShape, Routing
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import same_bits

PAIR = Pair("cuda", "nvlink")
RANKS = 2


# ---------------------------------------------------------------------- process groups


def over_nccl(rank, pg) -> None:
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    nccl = dist.new_group(backend="nccl")
    case = Case((6, 3), 8, 3, routing="half_dropped")
    with PAIR.open(nccl, case.shape) as group:
        group.warmup()
        for options in (DispatchOptions(), DispatchOptions(Layout.EXPERTS, alignment=4, counts="device")):
            check_round_trip(group, case, options)
    with PAIR.open(pg, case.shape) as group:  # and again over gloo, with the other group's connections open
        check_round_trip(group, case, DispatchOptions())
    dist.destroy_process_group(nccl)


@pytest.mark.skipif(NUM_GPUS < 2, reason="NCCL needs a GPU for each rank")
def test_a_group_over_nccl_only(worlds):
    worlds(RANKS, "cuda").run(over_nccl)


def chosen(rank, pg) -> tuple[str, str, list[str]]:
    with said() as lines, ExpertGroup(pg, MoeShape(4, 2, 16, 8)) as group:
        assert group.device == torch.device("cuda", torch.cuda.current_device())
        return group.backend, group.transport, lines


def test_auto_chooses_cuda(worlds):
    for backend, transport, lines in worlds(RANKS, "cuda").run(chosen):
        assert (backend, transport) == ("cuda", "nvlink")
        assert len([line for line in lines if "chose cuda" in line]) == 1


def other_shapes(rank, pg) -> str:
    with pytest.raises(ConfigError) as caught:
        PAIR.open(pg, MoeShape(4, 2, 16, 8 + rank))
    return str(caught.value)


def test_ranks_with_other_shapes(worlds):
    for text in worlds(RANKS, "cuda").run(other_shapes):
        assert "max_tokens=8" in text
        assert "max_tokens=9" in text


def many_groups(rank, pg) -> tuple[int, int]:
    """Groups come and go; their memory with them."""
    case = Case((6, 3), 8, 3)
    free = []
    for i in range(12):
        with PAIR.open(pg, case.shape) as group:
            check_round_trip(group, case, DispatchOptions())
        del group
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        pg.barrier().wait()
        if i in (3, 11):
            free.append(torch.cuda.mem_get_info()[0])
        pg.barrier().wait()
    return free[0], free[1]


def test_groups_give_their_memory_back(worlds):
    for before, after in worlds(RANKS, "cuda").run(many_groups):
        assert before - after < 64 << 20, f"{(before - after) >> 20} MiB less after eight more groups"


# ---------------------------------------------------------------------- ends of ranges


LAYOUTS = (
    DispatchOptions(),
    DispatchOptions(Layout.EXPERTS, alignment=4, counts="device"),
    DispatchOptions(Layout.MASKED),
)


def wide_and_narrow(rank, pg) -> None:
    cases = [
        Case((9, 5), 8, 3, hidden=8),  # 16 bytes
        Case((9, 5), 8, 3, hidden=24, dtype=torch.float16),  # 48 bytes
        Case((9, 5), 8, 3, hidden=1000),  # 2000 bytes: no power of two, and no multiple of 128
        Case((9, 5), 4, 2, hidden=8192, dtype=torch.float64),  # 64 KB
    ]
    with PAIR.open(pg, cases[-1].shape) as group:
        for case in cases:
            for options in LAYOUTS:
                check_round_trip(group.for_shape(case.shape), case, options)
        case = Case((5, 4), 4, 2, hidden=32768)
        for options in (DispatchOptions(), DispatchOptions(Layout.EXPERTS)):
            check_one(group.for_shape(case.shape), case, options)


def check_one(group: ExpertGroup, case: Case, options: DispatchOptions) -> None:
    """One dispatch and one combine, in the dtype of the case only."""
    deal = Deal(case, options, oracle_for(case, options), group.rank)
    mine = deal.oracle.sent[group.rank]
    sent = group.dispatch(mine.x, routing_of(mine), options=options)
    check_delivered(deal, sent, None, [one.topk_weights for one in deal.oracle.sent])
    check_plan(deal, sent)
    check_combine(group, deal, sent, None, 1, True, True)


def test_rows_of_16_bytes_to_64_kilobytes(worlds):
    worlds(RANKS, "cuda").run(wide_and_narrow)


def most_experts(rank, pg) -> None:
    case = Case((9, 5), 4096, 64, hidden=64, routing="half_dropped")
    with PAIR.open(pg, case.shape) as group:
        for options in (
            DispatchOptions(),
            DispatchOptions(Layout.EXPERTS, counts="device"),
            DispatchOptions(Layout.MASKED, capacity=14),
        ):
            check_one(group, case, options)


def test_most_choices_of_most_experts(worlds):
    worlds(RANKS, "cuda").run(most_experts)


def no_tokens(rank, pg) -> None:
    case = Case((0, 0), 8, 3, hidden=64)
    with PAIR.open(pg, case.shape) as group:
        for layout in Layout:
            for counts in ("host", "device"):
                check_round_trip(group, case, DispatchOptions(layout, counts=counts))


def test_no_tokens_at_all(worlds):
    worlds(RANKS, "cuda").run(no_tokens)


def any_number_of_sms(rank, pg) -> None:
    """The same bits on one SM, on a few, and on more than there are."""
    case, options = Case((300, 260), 8, 3, hidden=512), DispatchOptions(Layout.EXPERTS, alignment=8)
    deal = Deal(case, options, oracle_for(case, options), rank)
    mine = deal.oracle.sent[rank]
    with PAIR.open(pg, case.shape) as group:
        homes = []
        for num_sms in (1, 7, 24, 100):
            sent = group.dispatch(mine.x, routing_of(mine), options=options, num_sms=num_sms)
            check_delivered(deal, sent, None, [one.topk_weights for one in deal.oracle.sent])
            again = group.redispatch(mine.x, sent.plan, num_sms=num_sms)
            same_bits(f"{num_sms=} redispatch", again.x[deal.places], sent.x[deal.places])
            homes.append(group.combine(sent.x, sent.plan, num_sms=num_sms).x)
        for home in homes[1:]:
            same_bits("combine", home, homes[0])


def test_any_number_of_sms(worlds):
    worlds(RANKS, "cuda").run(any_number_of_sms)


# ---------------------------------------------------------------------- sizes beyond 2^31 and 2^32 bytes


TOKENS = 160_000
"""Each goes to both ranks: 320000 rows of 14336 bytes arrive, 4.6e9 bytes; 2^32 is passed near row 299593."""


def check_big(what: str, layout: Layout, x: Tensor) -> None:
    everything = torch.arange(RANKS * TOKENS, device=x.device)
    if layout is Layout.ROWS:
        check_numbered(what, x, everything)
        return
    by_expert = x if layout is Layout.MASKED else x.unflatten(0, (2, -1))
    for expert in range(2):
        check_numbered(f"{what} of expert {expert}", by_expert[expert], everything[expert::2])


def big(rank, pg, layout: Layout) -> None:
    """Token t of every rank goes to expert t % 2 of rank 0 and of rank 1."""
    tokens = torch.arange(TOKENS, device="cuda")
    mine = tokens + rank * TOKENS
    x = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")
    for first in range(0, TOKENS, STEP):
        x[first : first + STEP] = numbered(mine[first : first + STEP])
    routing = Routing(torch.stack([tokens % 2, 2 + tokens % 2], dim=1).contiguous())
    half = RANKS * TOKENS // 2
    options = DispatchOptions(layout, capacity=half if layout is Layout.MASKED else None)
    with PAIR.open(pg, MoeShape(4, 2, HIDDEN, TOKENS)) as group:
        sent = group.dispatch(x, routing, options=options)
        assert sent.host_counts == (half, half)
        check_big("dispatch", layout, sent.x)
        check_numbered("combine", group.combine(sent.x, sent.plan).x, mine, factor=2)
        y, plan = sent.x.clone(), sent.plan  # peers cannot reach a clone: it is copied into the heap first
        del sent
        check_numbered("combine from elsewhere", group.combine(y, plan).x, mine, factor=2)
        del y
        check_big("redispatch", layout, group.redispatch(x, plan).x)


@pytest.mark.parametrize("layout", Layout, ids=lambda layout: layout.value)
def test_offsets_beyond_32_bits(worlds, layout):
    needed = 36 * GIB * (RANKS if NUM_GPUS < RANKS else 1)
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed // GIB} GiB of GPU memory, {free // GIB} GiB are free")
    worlds(RANKS, "cuda").run(big, layout)


# ---------------------------------------------------------------------- the heap


@contextmanager
def said() -> Iterator[list[str]]:
    """Collect what tokenferry logs meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("tokenferry")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(handler)


HALF = Case((40, 40), 4, 4, hidden=4096)
"""Each token goes to both ranks: 80 rows of 8 KB arrive, 0.63 MiB. A heap of 1 MiB has no room for two such results."""


def small_heap(rank, pg, layout: Layout) -> list[str]:
    case = HALF if layout is Layout.ROWS else replace(HALF, tokens=(20, 20))  # both experts of a rank get each token
    deal = Deal(case, DispatchOptions(layout), oracle_for(case, DispatchOptions(layout)), rank)
    mine = deal.oracle.sent[rank]
    with heap_of(1), said() as lines, PAIR.open(pg, case.shape) as group:
        held = []
        for _ in range(8):
            held.append(group.dispatch(mine.x, routing_of(mine), options=deal.options))
            check_combine(group, deal, held[-1], None, 0, False, False)
            group.combine(held[-1].x, held[-1].plan)
        for sent in held:
            check_delivered(deal, sent, None, [one.topk_weights for one in deal.oracle.sent])
    return lines


@pytest.mark.parametrize("layout", [Layout.ROWS, Layout.EXPERTS], ids=lambda layout: layout.value)
def test_a_heap_too_small_for_two_results_copies_and_says_so_once(worlds, layout):
    for lines in worlds(RANKS, "cuda").run(small_heap, layout):
        logged = [line for line in lines if "TOKENFERRY_HEAP_MB" in line]
        assert len(logged) == 1, lines
        assert "MiB" in logged[0]


def full_heap(rank, pg) -> str:
    large, small = Case((100, 100), 4, 4, hidden=4096), Case((5, 5), 4, 4, hidden=4096)
    mine = large.inputs()[rank]
    with heap_of(1), PAIR.open(pg, large.shape) as group:
        for _ in range(2):
            with pytest.raises(CapacityError, match=r"dispatch: rank \d received 200 rows, and its heap") as caught:
                group.dispatch(mine.x, routing_of(mine))
            check_one(group, small, DispatchOptions())
    return str(caught.value)


def test_a_heap_too_small_for_one_result_is_an_error_of_all_ranks(worlds):
    first, second = worlds(RANKS, "cuda").run(full_heap)
    assert first == second
    assert "times as large with TOKENFERRY_HEAP_MB" in first


def too_large_a_heap(rank, pg) -> str:
    with heap_of(1 << 20), pytest.raises(Exception, match="TOKENFERRY_HEAP_MB") as caught:
        PAIR.open(pg, HALF.shape)
    return type(caught.value).__name__


def test_a_heap_that_no_gpu_has_room_for(worlds):
    assert worlds(RANKS, "cuda").run(too_large_a_heap) == ["BackendUnavailable"] * RANKS
