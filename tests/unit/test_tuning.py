"""Numbers of SMs and their reasons; what a uniform routing moves."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenferry import topology, tuning
from tokenferry.backends.cuda.across.decode_forms import rail_sizes
from tokenferry.backends.cuda.workspace import bytes_of, sizes_for
from tokenferry.errors import ConfigError
from tokenferry.kernels.codes import RAIL_CHUNKS
from tokenferry.tuning import Machine, travel, tune
from tokenferry.types import MoeShape

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
V3 = MoeShape(num_experts=256, top_k=8, hidden=7168, max_tokens=4096)
H200 = Machine(num_ranks=8, num_sms=132)


def sized(max_tokens, hidden=7168):
    return MoeShape(num_experts=256, top_k=8, hidden=hidden, max_tokens=max_tokens)


def test_large_calls_take_the_measured_numbers():
    tuned = tune(V3, H200)
    assert (tuned.dispatch_sms, tuned.combine_sms, tuned.push_sms) == (16, 16, 32)
    dispatch, combine, push, heap = tuned.reasons
    assert "247 us with 12 to 24 SMs" in dispatch
    assert "288 us with 8" in dispatch
    assert "494 us with 16 to 24 SMs and 570 us with 12" in combine
    assert "519 us, 547 with 24 and 504 with 48 (4 H200)" in push
    assert "T=4096 took 494 us, and 504 when they were pushed, with as many SMs as help (4 H200)" in heap


def test_times_of_four_gpus_are_those_of_runs_that_are_kept():
    """So what `tokenferry explain` gives as reasons can be looked up, all of it from one commit and machine."""

    def measured(file, mode):
        results = json.loads((BENCHMARKS / f"2026-11-29_4xh200_67d3d47-{file}.json").read_text())["results"]
        for each in results:
            label = each["label"]
            if label["routing"] == "uniform":
                yield (label["call"], label["rows"], label["tokens"], label["num_sms"]), round(each[mode]["median_us"])

    over_sms = dict(measured("sms", "back_to_back"))
    for call, rows, curve in (
        ("dispatch, plan kept", "fp8", tuning.DISPATCH_US),
        ("combine, rows in the group's memory", "bf16", tuning.COMBINE_US),
        ("combine, rows in user memory", "bf16", tuning.PUSH_US),
    ):
        found = {sms: us for (name, kind, _, sms), us in over_sms.items() if (name, kind) == (call, rows)}
        assert dict(curve) == found
    calls = {key[:3]: us for key, us in measured("calls", "isolated")}
    for tokens, (fetched, pushed) in tuning.FETCHED_OR_PUSHED_US.items():
        if tokens == 4096:
            assert (fetched, pushed) == (min(us for _, us in tuning.COMBINE_US), min(us for _, us in tuning.PUSH_US))
        else:
            assert fetched == calls["combine, rows in the group's memory", "bf16", tokens]
            assert pushed == calls["combine, rows in user memory", "bf16", tokens]


@pytest.mark.parametrize(
    ("max_tokens", "hidden", "numbers"),
    # An SM moves 8 rows, or sums 12 pieces of 2048 bytes, at a time; as many push as add up.
    [
        (1, 7168, (1, 1, 2)),
        (8, 7168, (1, 5, 10)),
        (9, 7168, (2, 6, 12)),
        (128, 7168, (16, 16, 66)),
        (192, 7168, (16, 16, 66)),
        (24, 8, (3, 2, 4)),
    ],
)
def test_small_calls_take_no_more_than_find_work(max_tokens, hidden, numbers):
    tuned = tune(sized(max_tokens, hidden), H200)
    assert (tuned.dispatch_sms, tuned.combine_sms, tuned.push_sms) == numbers
    for number, reason in zip(numbers, tuned.reasons[:3], strict=True):
        assert f": {number} SM{'s' if number > 1 else ''}: " in reason


@pytest.mark.parametrize(
    ("max_tokens", "measured", "fetched"), [(70, 128, 21), (128, 128, 21), (700, 512, 39), (1 << 17, 8192, 365)]
)
def test_reasons_between_two_ranks_quote_what_was_measured_nearest(max_tokens, measured, fetched):
    _, combine, _, heap = tune(sized(max_tokens), Machine(2, 132)).reasons
    for reason in (combine, heap):
        assert f"rows of T={measured} took {fetched} us" in reason


def test_reasons_for_few_rows_quote_few_rows():
    assert not any("T=4096" in reason for reason in tune(sized(128), Machine(2, 132)).reasons)


@pytest.mark.parametrize(("num_ranks", "number"), [(2, 35), (4, 16), (8, 16)])
def test_combine_takes_as_many_as_add_up_what_the_links_bring(num_ranks, number):
    """Fewer rows cross the links of two ranks than of four, so more SMs have to add up: 16 took twice as long as 32."""
    tuned = tune(V3, Machine(num_ranks, 132))
    assert tuned.combine_sms == number
    assert ("189 us with 40 and 371 us with 16" in tuned.reasons[1]) == (num_ranks == 2)


@pytest.mark.parametrize(("num_ranks", "number"), [(2, 48), (3, 32), (8, 32)])
def test_between_two_ranks_more_sms_push_and_add_up(num_ranks, number):
    tuned = tune(V3, Machine(num_ranks, 132))
    assert tuned.push_sms == number
    assert ("220 us, 307 with 24 and 212 with 66 (2 H200)" in tuned.reasons[2]) == (num_ranks == 2)


def test_combine_of_one_choice_has_a_most():
    """Each token has one row, which crosses the links in one case of two."""
    tuned = tune(MoeShape(num_experts=256, top_k=1, hidden=7168, max_tokens=4096), Machine(2, 132))
    assert tuned.combine_sms == 40


@pytest.mark.parametrize("max_tokens", [1, 100, 4096])
@pytest.mark.parametrize("num_sms", [1, 8, 20, 132])
@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_never_more_than_there_are_and_never_none(max_tokens, num_sms, num_ranks):
    tuned = tune(sized(max_tokens), Machine(num_ranks, num_sms))
    assert 1 <= tuned.dispatch_sms <= num_sms
    assert 1 <= tuned.combine_sms <= num_sms
    assert 1 <= tuned.push_sms <= num_sms
    names = ["dispatch", "combine", "combine of rows in the user's memory", "combine of rows in the heap"]
    assert [reason.split(":")[0] for reason in tuned.reasons] == names


@pytest.mark.parametrize(("num_sms", "pushers"), [(1, 1), (2, 1), (3, 1), (16, 6), (20, 8), (24, 10), (132, 16)])
def test_some_push_and_some_add_up(num_sms, pushers):
    assert tuning.num_pushers(num_sms) == pushers


def test_one_rank_uses_no_links():
    """Nothing else limits it, so it takes more SMs."""
    tuned = tune(V3, Machine(1, 132))
    assert (tuned.dispatch_sms, tuned.combine_sms, tuned.push_sms) == (40, 64, 64)
    assert all("one rank" in reason for reason in tuned.reasons)
    assert tune(sized(256), Machine(1, 132)).push_sms == 64, "no rows land late"
    assert "T=4096 took 43 us, 86 with 16" in tuned.reasons[0]
    assert "T=4096 took 92 us, 328 with 16" in tuned.reasons[1]
    assert "T=4096 took 60 us, 191 with 16" in tuned.reasons[2]


@pytest.mark.parametrize(("ranks", "sms", "name"), [(0, 132, "num_ranks"), (8, 0, "num_sms")])
def test_machine_refuses(ranks, sms, name):
    with pytest.raises(ConfigError, match=f"Machine: {name}: expected a positive integer, got 0"):
        Machine(ranks, sms)


def test_travel_is_what_targets_say():
    """256 experts, 8 ranks, top 8: a token goes to 5.295 ranks, 4.633 of them remote; 272 MB leave a GPU at T=4096."""
    moved = travel(V3, 8, 4096, 14336)
    assert moved.ranks_per_token == pytest.approx(5.295, abs=1e-3)
    assert moved.remote_per_token == pytest.approx(4.633, abs=1e-3)
    assert moved.bytes_out == pytest.approx(272.0e6, rel=1e-3)
    assert moved.rows_received == pytest.approx(4096 * 5.295, rel=1e-3)


def test_travel_of_random_routings():
    shape, ranks = MoeShape(12, 3, 8, 64), 4
    experts = torch.rand(20000, 12, generator=torch.Generator().manual_seed(0)).topk(3, dim=1).indices
    hit = torch.zeros(20000, ranks).scatter_(1, experts // 3, 1.0)
    assert travel(shape, ranks, 1, 16).ranks_per_token == pytest.approx(hit.sum(1).mean().item(), rel=0.01)


@pytest.mark.parametrize(
    ("experts", "top_k", "ranks", "expected"), [(8, 8, 4, 4.0), (4, 1, 4, 1.0), (8, 3, 1, 1.0), (8, 7, 2, 2.0)]
)
def test_travel_at_the_edges(experts, top_k, ranks, expected):
    moved = travel(MoeShape(experts, top_k, 8, 8), ranks, 10, 16)
    assert moved.ranks_per_token == pytest.approx(expected)
    assert moved.remote_per_token == pytest.approx(expected * (ranks - 1) / ranks)


def test_curves_are_read_between_their_points():
    for curve in (tuning.STORE_GBPS, tuning.LOAD_GBPS):
        for sms, rate in curve:
            assert tuning.gbps(curve, sms) == rate
        for (low, low_rate), (high, high_rate) in itertools.pairwise(curve):
            assert tuning.gbps(curve, (low + high) / 2) == pytest.approx((low_rate + high_rate) / 2)
    assert tuning.gbps(tuning.STORE_GBPS, 2) == 86.0
    assert tuning.gbps(tuning.STORE_GBPS, 1000) == 340.0


@pytest.mark.parametrize("max_tokens", [1, 128, 4096])
def test_the_heap_has_room_for_five_deliveries(max_tokens):
    shape = sized(max_tokens)
    heap = tuning.heap_bytes(shape, 8)
    assert heap >= 64 << 20
    assert heap >= 5 * 8 * max_tokens * (2 * 7168 + 8 * 12)
    decode = bytes_of(sizes_for(shape, 8, 2), 8)  # what decode calls have under way
    assert heap >= 5 * 8 * max_tokens * 2 * 7168 + decode or decode > 512 << 20


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [
        (MoeShape(256, 8, 7168, 128), 8),
        (MoeShape(256, 8, 7168, 4096), 4),
        (MoeShape(4096, 64, 48, 1), 1),
        (MoeShape(6, 3, 1000, 33), 3),
    ],
)
def test_the_estimate_of_decode_memory_is_enough_and_not_much_more(shape, ranks):
    needed, estimated = bytes_of(sizes_for(shape, ranks, 2), ranks), tuning.decode_bytes(shape, ranks)
    assert needed <= estimated <= 1.1 * needed + 4096


@pytest.mark.parametrize("slots", [None, 20])
@pytest.mark.parametrize(("nodes", "per_node"), [(2, 1), (2, 8), (8, 4)])
def test_the_estimate_of_decode_memory_across_nodes(nodes, per_node, slots):
    shape = replace(sized(100), node_slots=slots)
    nodes_of = topology.Topology(0, topology.consecutive(nodes * per_node, per_node))
    inside = rail_sizes(shape, nodes_of).shape(shape.num_experts, shape.hidden)
    needed = bytes_of(sizes_for(inside, per_node, 2, nodes), per_node)
    estimated = tuning.decode_bytes(shape, nodes * per_node, nodes)
    assert needed <= estimated <= 1.1 * needed + 4096


def test_explain_names_the_heap_that_groups_make():
    from tokenferry.backends.base import Resolved
    from tokenferry.backends.cuda.setup import heap_bytes

    for shape in (V3, sized(1), sized(128)):
        resolved = Resolved(shape, "cuda", "auto", 1.0, False, None, "")
        assert heap_bytes(resolved, 8, 1 << 50) == tuning.heap_bytes(shape, 8)


def test_rows_between_nodes_cross_in_chunks_that_are_large_enough():
    assert tuning.rail_chunks(0, 7168, 8) == (0,)
    assert tuning.rail_chunks(128, 14336, 8) == (0,)
    assert tuning.rail_chunks(780, 14336, 8) == (0,), "three quarters are less than 8 MiB"
    assert tuning.rail_chunks(781, 14336, 8) == (0, 195), "1 to 3"
    assert tuning.rail_chunks(1300, 7168, 8) == (0,)
    assert tuning.rail_chunks(4095, 14336, 8) == (0, 315, 1260), "1 to 3 to 9"
    assert tuning.rail_chunks(8192, 14336, 8) == (0, 205, 819, 2662), "1 to 3 to 9 to 27"
    assert tuning.rail_chunks(4096, 14336, 1) == (0, 1024), "one rank has nothing to send inside of its node"
    assert len(tuning.rail_chunks(1 << 30, 1 << 30, 8)) == tuning.MOST_RAIL_CHUNKS
    assert tuning.rail_chunks(3, 1 << 30, 8) == (0, 1), "none is empty"
    assert tuning.MOST_RAIL_CHUNKS <= RAIL_CHUNKS, "kernels have room for so many"
    assert tuning.why_rail_chunks(4096, 14336, 8).startswith("one more would cost as much as it saves")
    assert tuning.why_rail_chunks(300, 14336, 8).startswith("with one more the longest would have less than 8 MiB")


@given(st.integers(0, 100_000), st.integers(1, 1 << 20), st.integers(1, 8))
def test_chunks_between_nodes_become_longer(num_tokens, row_bytes, ranks_per_node):
    firsts = tuning.rail_chunks(num_tokens, row_bytes, ranks_per_node)
    sizes = [end - first for first, end in itertools.pairwise([*firsts, num_tokens])]
    assert firsts[0] == 0
    assert sizes == sorted(sizes)
    assert num_tokens == 0 or min(sizes) > 0


def test_tokens_that_go_to_another_node():
    assert tuning.tokens_for_node(MoeShape(256, 8, 7168, 4096), 2) == 4080, "all but one of 256"
    assert tuning.tokens_for_node(MoeShape(256, 8, 7168, 4096), 8) == 2689
    assert tuning.tokens_for_node(MoeShape(256, 8, 7168, 4096, max_nodes=4), 8) == 2048
    assert tuning.tokens_for_node(MoeShape(256, 1, 7168, 3), 256) == 1


def test_a_routing_crosses_with_the_headers_if_it_is_small():
    token_bytes = 8 * 2 + 4
    assert tuning.routing_at_once(4096, token_bytes, 7)
    assert tuning.routing_at_once(52428, token_bytes, 1)
    assert not tuning.routing_at_once(4096, token_bytes, 15), "1.2 MB"
    assert not tuning.routing_at_once(2**31 - 1, token_bytes, 1), "nobody knows M"
