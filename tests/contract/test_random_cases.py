"""Random cases on every transport."""

import os

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from support.pairs import PAIRS, Pair
from support.throughput import check_round_trip, needed
from tokenferry import DispatchOptions, Layout
from tokenferry.testing.cases import ROUTINGS, Case

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
RANKS = 3


@st.composite
def case(draw: st.DrawFn) -> Case:
    dtype = draw(st.sampled_from(DTYPES))
    return Case(
        tokens=tuple(draw(st.lists(st.integers(0, 9), min_size=RANKS, max_size=RANKS))),
        experts=RANKS * draw(st.integers(1, 5)),
        top_k=draw(st.integers(1, 9)),
        hidden=16 // dtype.itemsize * draw(st.integers(1, 5)),
        dtype=dtype,
        idx_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        routing=draw(st.sampled_from(ROUTINGS)),
        weights=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def case_and_options(draw: st.DrawFn) -> tuple[Case, DispatchOptions]:
    chosen = draw(case())
    layout = draw(st.sampled_from(Layout))
    counts = draw(st.sampled_from(("host", "device")))
    alignment = draw(st.integers(1, 9)) if layout is Layout.EXPERTS else 1
    capacity = None
    if (counts == "device" or layout is Layout.MASKED) and draw(st.booleans()):
        capacity = needed(chosen, layout, alignment) + draw(st.integers(0, 3))
    zero = layout is not Layout.ROWS and draw(st.booleans())
    return chosen, DispatchOptions(layout, alignment, zero, counts, capacity)


def round_trip(rank, pg, pair: Pair, chosen: Case, options: DispatchOptions) -> None:
    with pair.open(pg, chosen.shape) as group:
        check_round_trip(group, chosen, options)


@settings(
    max_examples=int(os.environ.get("EXAMPLES", "60")),
    derandomize="EXAMPLES" not in os.environ,
    database=None,
    # A failure ends the ranks, and each new world takes a second: cases print well, so they are not shrunk.
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(chosen=case_and_options(), pair=st.sampled_from(PAIRS))
def test_any_case_on_any_transport(run, chosen, pair):
    run(pair, RANKS, round_trip, *chosen)
