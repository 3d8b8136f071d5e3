"""Random topologies and routings: dispatch, redispatch and combine over two levels, between threads."""

import os
import pickle
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from support.decode_jobs import hooks_in_any_order
from support.memory_transport import MemoryPair, run_threads
from support.throughput import (
    COMBINES,
    Deal,
    check_combine,
    check_delivered,
    check_plan,
    check_quantized,
    check_redispatch,
    needed,
    oracle_for,
    quantized,
    routing_of,
)
from support.throughput_jobs import many_plans, plans_in_other_views
from support.topologies import topologies
from tokenferry import DispatchOptions, ExpertGroup, Layout
from tokenferry.testing.cases import ROUTINGS, Case
from tokenferry.testing.oracle import Oracle

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Plot:
    """What one example does.

    Attributes:
        nodes: The ranks of each node, which need not be consecutive.
        case: The inputs.
        options: Those of the dispatch.
        combine: Which of `COMBINES`.
        packed: Whether the rows that are dispatched are `Quantized`.
    """

    nodes: tuple[tuple[int, ...], ...]
    case: Case
    options: DispatchOptions
    combine: int
    packed: bool


@st.composite
def plots(draw: st.DrawFn) -> Plot:
    nodes = draw(topologies())
    ranks = sum(map(len, nodes))
    dtype = draw(st.sampled_from(DTYPES))
    case = Case(
        tokens=tuple(draw(st.lists(st.integers(0, 6), min_size=ranks, max_size=ranks))),
        experts=ranks * draw(st.integers(1, 3)),
        top_k=draw(st.integers(1, 9)),
        hidden=16 // dtype.itemsize * draw(st.integers(1, 3)),
        dtype=dtype,
        idx_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        routing=draw(st.sampled_from(ROUTINGS)),
        weights=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )
    layout = draw(st.sampled_from(Layout))
    counts = draw(st.sampled_from(("host", "device")))
    alignment = draw(st.integers(1, 9)) if layout is Layout.EXPERTS else 1
    capacity = None
    if (counts == "device" or layout is Layout.MASKED) and draw(st.booleans()):
        capacity = needed(case, layout, alignment) + draw(st.integers(0, 3))
    zero = layout is not Layout.ROWS and draw(st.booleans())
    options = DispatchOptions(layout, alignment, zero, counts, capacity)
    return Plot(nodes, case, options, draw(st.integers(0, len(COMBINES) - 1)), draw(st.booleans()))


def round_trip(rank: int, pg: None, pair: MemoryPair, plot: Plot, oracle: Oracle) -> None:
    with pair.open(pg, plot.case.shape) as group:
        check_plot(group, plot, Deal(plot.case, plot.options, oracle, rank))


def check_plot(group: ExpertGroup, plot: Plot, deal: Deal) -> None:
    case, options, oracle = deal.case, deal.options, deal.oracle
    mine = oracle.sent[group.rank]
    sent = group.dispatch(mine.x, routing_of(mine), options=options)
    check_delivered(deal, sent, None, [one.topk_weights for one in oracle.sent])
    check_plan(deal, sent)
    check_combine(group, deal, sent, *COMBINES[plot.combine])
    if plot.packed:
        rows = [quantized(case, rank, width=32, num_scales=5, scale_dtype=torch.uint8) for rank in range(case.ranks)]
        packed = group.dispatch(rows[group.rank], routing_of(mine), options=options)
        check_quantized(deal, packed, rows)
        sent = group.redispatch(mine.x, pickle.loads(pickle.dumps(packed.plan)))
    check_redispatch(group, deal, sent)


@settings(
    max_examples=int(os.environ.get("EXAMPLES", "60")),
    deadline=None,
    derandomize="EXAMPLES" not in os.environ,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
@example(plot=Plot(((0, 3), (1, 2)), Case((3, 4, 2, 5), 8, 3), DispatchOptions(), 1, packed=True))
@given(plot=plots())
def test_any_topology_and_routing(plot):
    """In the example, the ranks of a rail are not in the order of their nodes."""
    run_threads(plot.nodes, round_trip, plot, oracle_for(plot.case, plot.options))


@pytest.mark.parametrize("nodes", [((0, 2), (1, 3)), ((0,), (1,), (2,))], ids=str)
def test_hooks_of_decode_calls_around_calls_of_two_levels(nodes):
    run_threads(nodes, hooks_in_any_order, sum(map(len, nodes)))


@pytest.mark.parametrize("job", [many_plans, plans_in_other_views])
def test_plans_of_two_levels_outlive_calls_and_views(job):
    run_threads(((0,), (1,), (2,)), job)
