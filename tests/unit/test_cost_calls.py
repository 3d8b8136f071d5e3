"""Bytes, times and memory of calls: the table behind the protocol, a simulation of the overlap, and measurements."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tokenferry import tuning
from tokenferry.backends.cuda.across.decode_forms import rail_sizes
from tokenferry.backends.cuda.across.parcels import Chunks, Expected, RowWidths, Step, Swap
from tokenferry.backends.cuda.across.relay import fixed_relay, make_relay
from tokenferry.compat.deep_ep.config import low_latency_rdma_size_hint
from tokenferry.cost import calls
from tokenferry.cost.calls import Times, decode_call, entry_bytes, sent_slots, slot_header_bytes, throughput_call
from tokenferry.cost.case import Case, Cluster, Gate, Links
from tokenferry.cost.deep_ep_v1 import low_latency
from tokenferry.cost.estimate import MOST_OVERFLOWS, DecodeSizes, estimate, expected_overflows, over_nodes
from tokenferry.cost.memory import throughput_memory
from tokenferry.cost.reach import uniform_reach
from tokenferry.cost.rows import RankRows, busiest, count_rows, expected_rows
from tokenferry.cost.sampling import Sampling
from tokenferry.errors import ConfigError
from tokenferry.topology import Topology, consecutive
from tokenferry.types import MoeShape

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
V3 = MoeShape(256, 8, 7168, 4096)
LINKS = Links(50.0, 330.0)
NOTHING_FIXED = Links(50.0, 330.0, 0.0)


def found(nodes, *, links=LINKS, gate=Gate(), rows="fp8", slots=None):  # noqa: B008 - frozen
    return estimate(Case(Cluster(nodes, 8), V3, gate, rows), links, DecodeSizes(128, slots), Sampling(2048))


# nodes: us at 50 GB/s of FP8 and BF16 rows: 128 tokens, exact counts; slots over rows; V1's copies; 4096 tokens
TABLE = {
    2: (19, 37, 1.00, 76, 147, 603, 1170),
    4: (51, 100, 1.11, 114, 220, 1641, 3183),
    8: (88, 170, 1.51, 133, 257, 2805, 5441),
    16: (116, 224, 2.45, 142, 275, 3703, 7182),
}


@pytest.mark.parametrize("nodes", TABLE)
def test_the_table_that_the_protocol_was_chosen_by(nodes):
    fp8, bf16, factor, v1_fp8, v1_bf16, floor_fp8, floor_bf16 = TABLE[nodes]
    each = found(nodes)
    rows = each.decoding.mean_rows.network_out
    us = (rows * 7392 / 50e3, rows * 14336 / 50e3)
    assert us == (pytest.approx(fp8, abs=0.6), pytest.approx(bf16, abs=0.6))
    capacity = each.decoding.dispatch.network_out_bytes / (rows * 7392)
    assert capacity == pytest.approx(factor, abs=0.006)
    v1 = each.deep_ep_v1
    assert (v1.dispatch_us, v1.combine_us) == (pytest.approx(v1_fp8, abs=0.6), pytest.approx(v1_bf16, abs=0.6))
    dispatch, combine = each.throughput.dispatch, each.throughput.combine
    assert dispatch.network_out_bytes / 50e3 == pytest.approx(floor_fp8, abs=0.6)
    assert combine.network_out_bytes / 50e3 == pytest.approx(floor_bf16, abs=0.6)
    no_overheads = found(nodes, links=NOTHING_FIXED)
    assert no_overheads.throughput.dispatch.times.network_us == pytest.approx(floor_fp8, abs=0.6)


def test_bytes_beside_rows_are_apart():
    case = Case(Cluster(4, 8), V3)
    assert entry_bytes(case) == 4 + 8 * (2 + 4)
    assert slot_header_bytes(case) == 64
    assert entry_bytes(replace(case, shape=MoeShape(1 << 15, 8, 7168, 1))) == 4 + 8 * (4 + 4)
    each = found(4)
    rows = each.throughput.busiest_rows.network_out
    assert each.throughput.dispatch.routing_out_bytes == pytest.approx(rows * 52 + 3 * 16)
    assert each.throughput.dispatch.network_out_bytes == pytest.approx(rows * 7392)
    assert each.decoding.dispatch.routing_out_bytes == 3 * 128 * 64
    assert each.decoding.dispatch.network_out_bytes == 3 * 128 * 7392
    assert each.throughput.combine.routing_out_bytes == 0
    assert each.decoding.combine.routing_out_bytes == 3 * 128 * 4 * 8


def simulated(network_us, own_us, relayed_us, shares):
    """When the last chunk has passed both legs: dispatch; own rows go first over NVLink, then chunks as they arrive."""
    nvlink_free, arrived = own_us, 0.0
    for share in shares:
        arrived += network_us * share
        nvlink_free = max(nvlink_free, arrived) + relayed_us * share
    return nvlink_free


def simulated_combine(network_us, own_us, relayed_us, shares):
    """The mirror image: other nodes' chunks go first over NVLink, then over the network, and own rows last."""
    reduced = sent = 0.0
    for share in shares:
        reduced += relayed_us * share
        sent = max(sent, reduced) + network_us * share
    return max(sent, reduced + own_us)


def swaps_of(call: str, case: Case, count: int) -> list[Swap]:
    """Return the exchanges of the calls themselves, on rank 0, if so many tokens cross to and from each other node."""
    nodes, most = case.cluster.num_nodes, case.shape.max_tokens
    data_bytes = case.dispatch_data_bytes if call == "dispatch" else case.combine_row_bytes
    row_bytes = case.dispatch_row_bytes if call == "dispatch" else data_bytes
    relay = make_relay(0, [most] + [count] * (nodes - 1), [most] + [count] * (nodes - 1), count, 0)
    steps = [Step(step, nodes - step) for step in range(1, nodes)]
    expected = Expected(tuning.tokens_for_node(case.shape, nodes), case.cluster.ranks_per_node)
    chunks = Chunks.of(steps, expected, data_bytes, back=call == "combine")
    widths = RowWidths.new(data_bytes, row_bytes - data_bytes, 0)
    return relay.swaps(steps, chunks, widths, back=call == "combine")


@given(
    st.integers(2, 32),
    st.integers(1, 100_000),
    st.integers(0, 20_000),
    st.integers(0, 100_000),
    st.sampled_from([Links(50.0, 330.0), Links(330.0, 330.0)]),
)
@example(3, 20_000, 0, 21_000, Links(330.0, 330.0))  # NVLink is slower, but waits for the first chunk
@pytest.mark.parametrize("call", ["dispatch", "combine"])
def test_the_overlap_of_chunks(call, nodes, network, own, relayed, links):
    count = -(-network // (nodes - 1))
    network, most = count * (nodes - 1), 2 * count
    case = Case(Cluster(nodes, 1), MoeShape(nodes, 1, 7168, most))
    rows = RankRows(network, network, own, own, relayed, relayed, 0)
    cost = throughput_call(call, case, [rows], links)
    nvlink_us = [count * cost.row_bytes / 330e3 for count in (own, relayed)]
    simulate = simulated if call == "dispatch" else simulated_combine
    swaps = swaps_of(call, case, count)
    expected = simulate(cost.times.network_us, *nvlink_us, [swap.send.num / network for swap in swaps])
    # What the last chunk completes.
    last = most - swaps[-1].send.first if nodes == 2 else most
    copied = 2 * network if call == "dispatch" else (network + 2 * most) * last / most
    copies = copied * cost.row_bytes / calls.COPY_GBS / 1e3
    assert cost.times.kept_us - calls.FIXED_US - copies == pytest.approx(expected)


@given(
    st.integers(2, 9), st.integers(1, 5000), st.sampled_from([128, 7168]), st.sampled_from(["fp8", "bf16"]), st.data()
)
@example(2, 4096, 7168, "fp8", None)
@example(2, 1553, 7168, "fp8", None)  # one chunk, and two if scales counted
def test_rows_cross_in_as_many_exchanges_as_in_the_calls(nodes, most, hidden, rows, data):
    """The model and backends/cuda/across cut them alike, where all nodes get equally many."""
    count = most if data is None else data.draw(st.integers(1, most))
    case = Case(Cluster(nodes, 1), MoeShape(nodes, 1, hidden, most), rows=rows)
    crossing = RankRows(count * (nodes - 1), count * (nodes - 1))
    for call in ("dispatch", "combine"):
        cost, swaps = throughput_call(call, case, [crossing], LINKS), swaps_of(call, case, count)
        assert cost.num_exchanges == len(swaps)
        assert cost.network_out_bytes == sum(swap.send.num_bytes for swap in swaps)
        assert cost.times.network_us == pytest.approx(cost.network_out_bytes / 50e3 + 10 * len(swaps))


@given(st.integers(2, 9), st.integers(1, 500), st.sampled_from(["fp8", "bf16"]))
def test_memory_of_rows_across_is_that_of_the_calls(nodes, most, rows):
    """With counts on the device, which is where it does not depend on a routing."""
    case = Case(Cluster(nodes, 1), MoeShape(4 * nodes, 3, 256, most), rows=rows)
    relay = fixed_relay(0, nodes, most, most)
    num = relay.first_in[-1] + relay.first_out[-1]
    data_bytes = case.dispatch_data_bytes
    dispatch = num * RowWidths.new(data_bytes, case.dispatch_row_bytes - data_bytes, 4 * 3).pitch
    combine = (num + most) * RowWidths.new(2 * 256, 0, 0).pitch
    assert throughput_memory(case, RankRows()).fixed_network_bytes == max(dispatch, combine)


@pytest.mark.parametrize("nodes", [2, 8])
@pytest.mark.parametrize("count", [700, 2048, 4096])
def test_a_dispatch_ends_with_a_short_chunk_and_a_combine_begins_with_it(nodes, count):
    """However many tokens there are: what crosses last is left to pass on, and what crosses first is added up first."""
    case = Case(Cluster(nodes, 8), V3, rows="bf16")
    short = tuning.tokens_for_node(V3, nodes) // 13 + 1
    for call, at in (("dispatch", -1), ("combine", 0)):
        swaps = swaps_of(call, case, count)
        assert 0 < swaps[at].send.num <= short
        assert sum(swap.send.num for swap in swaps) == count * (nodes - 1)


def test_the_busier_direction_of_the_busiest_rank_counts():
    case = Case(Cluster(2, 2), MoeShape(4, 1, 512, 8), rows="bf16")
    quiet, busy = RankRows(1, 2, 1, 1, 1, 1, 1), RankRows(1, 50, 3, 4, 5, 60, 70)
    cost = throughput_call("dispatch", case, [quiet, busy, quiet, quiet], NOTHING_FIXED)
    assert cost.times.network_us == pytest.approx(50 * 1024 / 50e3)
    assert cost.times.nvlink_us == pytest.approx(64 * 1024 / 330e3)
    assert (cost.network_out_bytes, cost.network_in_bytes) == (1024, 50 * 1024)
    assert (cost.nvlink_out_bytes, cost.nvlink_in_bytes) == (8 * 1024, 64 * 1024)
    back = throughput_call("combine", case, [quiet, busy, quiet, quiet], NOTHING_FIXED)
    assert (back.network_out_bytes, back.network_in_bytes) == (50 * 1024, 1024)


def test_counted_rows_have_a_cost_too():
    """What a real run will be compared with: its own routing, not an expectation."""
    cluster, shape = Cluster(2, 2), MoeShape(8, 2, 128, 2)
    rows = count_rows([[[0, 5], [0, 1]], [[6, 7]], [], [[0, 4]]], 8, cluster.nodes)
    cost = throughput_call("dispatch", Case(cluster, shape), rows, LINKS)
    assert cost.network_out_bytes == 1 * (128 + 4)
    assert cost.routing_out_bytes == pytest.approx(1 * (4 + 2 * 6) + 16)


def test_decode_calls_send_every_slot_and_their_legs_follow_each_other():
    each = found(8, slots=100)
    case = Case(Cluster(8, 8), replace(V3, max_tokens=128))
    rows = expected_rows(case, uniform_reach(case))
    cost = decode_call("dispatch", case, rows, LINKS, 100)
    assert cost == each.decoding.dispatch
    times = cost.times
    assert cost.chunk_tokens == 104, "a multiple of eight, as the kernels send"
    assert times.network_us == pytest.approx(7 * 104 * (7392 + 64) / 50e3 + 10)
    assert times.nvlink_us == pytest.approx(busiest(rows).own_out * 8 * 7392 / 330e3 / 0.62)
    packing = 2 * busiest(rows).network_out * 7392 / 4143e3
    assert times.total_us == pytest.approx(times.network_us + times.nvlink_us + packing + 7)


def test_one_node_has_no_network():
    each = found(1)
    for family in (each.throughput, each.decoding):
        for cost in (family.dispatch, family.combine):
            assert cost.network_out_bytes == cost.routing_out_bytes == cost.times.network_us == cost.num_exchanges == 0
            assert (cost.num_chunks, cost.chunk_tokens) == (0, 0)
            assert cost.times.exposed_us == 0
            assert cost.times.bound_by in ("NVLink", "overheads")
        memory = family.memory
        assert memory.network_bytes == memory.worst_network_bytes == memory.fixed_network_bytes == 0
    assert each.overflows == 0
    assert each.deep_ep_v1.network_copies == 0


@pytest.mark.parametrize(
    ("times", "bound"),
    [
        (Times(10, 100, 50, 5, 20), "network"),
        (Times(10, 50, 100, 5, 20), "NVLink"),
        (Times(50, 10, 40, 5, 20), "overheads"),
    ],
)
def test_what_bounds_a_call(times, bound):
    assert times.bound_by == bound


def test_times_of_a_call():
    times = Times(10, 100, 50, 5, 20)
    assert (times.kept_us, times.total_us) == (125, 135)


def test_overflows_are_a_binomial_tail():
    """Three tokens, one slot, nodes hit with probability 1/2: more than one of three, for each rank and other node."""
    case = Case(Cluster(2, 1), MoeShape(2, 1, 128, 3))
    each = estimate(case, LINKS, DecodeSizes(3, 1), Sampling())
    assert each.overflows == pytest.approx(2 * (3 + 1) / 8)
    assert estimate(case, LINKS, DecodeSizes(3), Sampling()).overflows == 0
    always = Case(Cluster(2, 1), MoeShape(2, 2, 128, 3))
    assert estimate(always, LINKS, DecodeSizes(3, 2), Sampling()).overflows == 2


@pytest.mark.parametrize(("nodes", "tokens"), [(1, 128), (2, 128), (8, 128), (32, 128), (32, 1)])
def test_enough_slots_are_the_fewest_that_hardly_overflow(nodes, tokens):
    case = Case(Cluster(nodes, 8), replace(V3, max_tokens=tokens))
    enough = estimate(case, LINKS, DecodeSizes(tokens), Sampling()).enough_slots
    reach = uniform_reach(case)
    assert expected_overflows(case.cluster, reach, DecodeSizes(tokens, enough)) < MOST_OVERFLOWS
    assert enough == 1 or expected_overflows(case.cluster, reach, DecodeSizes(tokens, enough - 1)) >= MOST_OVERFLOWS


@pytest.mark.parametrize("slots", [1, 8, 9, 100, 128])
def test_as_many_slots_cross_as_in_the_calls(slots):
    sizes = rail_sizes(replace(V3, max_tokens=128, node_slots=slots), Topology(0, consecutive(64, 8)))
    assert sent_slots(slots) == sizes.segment


def test_a_call_that_the_model_does_not_have():
    case = Case(Cluster(2, 8), V3)
    rows = expected_rows(case, uniform_reach(case))
    with pytest.raises(ConfigError, match="'redispatch' is no call of the model"):
        throughput_call("redispatch", case, rows, LINKS)
    with pytest.raises(ConfigError, match="'decode_combine' is no call of the model"):
        decode_call("decode_combine", case, rows, LINKS, 8)


def test_memory():
    each = found(8, gate=Gate(8, 4))
    memory = each.throughput.memory
    assert memory.worst_network_bytes == 4096 * (4 + 7 + 1) * 14336
    assert memory.fixed_network_bytes == 4096 * (7 + 7 + 1) * 14336
    most = each.throughput.busiest_rows
    assert memory.network_bytes == (most.network_out + most.network_in + 4096) * 14336
    assert memory.worst_rows_bytes == 64 * 4096 * 7392
    assert memory.expected_rows_bytes == pytest.approx(each.throughput.busiest_rows.received * 7392)
    slots = each.decoding.memory
    assert slots.network_bytes == 4 * 7 * 128 * (7392 + 64 + 14336 + 32)
    assert slots.network_bytes == slots.worst_network_bytes == slots.fixed_network_bytes
    assert found(8).throughput.memory.worst_network_bytes == 4096 * (7 + 7 + 1) * 14336
    wider = Case(Cluster(8, 8), replace(V3, max_nodes=5), Gate(8, 4))
    memory = estimate(wider, LINKS, DecodeSizes(), Sampling(16)).throughput.memory
    assert memory.worst_network_bytes == 4096 * (5 + 7 + 1) * 14336, (
        "the limit of the group, not what the gate needs of it"
    )


def test_memory_of_deep_ep_is_its_own_hint():
    assert low_latency(Case(Cluster(4, 8), V3), LINKS).buffer_bytes == low_latency_rdma_size_hint(4096, 7168, 256)
    assert found(4).deep_ep_v1.buffer_bytes == low_latency_rdma_size_hint(128, 7168, 256)


def test_over_nodes_takes_what_divides_the_experts():
    def nodes(cluster, experts):
        case = Case(cluster, MoeShape(experts, 2, 128, 4))
        return [each.case.cluster.num_nodes for each in over_nodes(case, LINKS, DecodeSizes(4), Sampling())]

    assert nodes(Cluster(8, 2), 32) == [1, 2, 4, 8]
    assert nodes(Cluster(6, 2), 36) == [1, 2, 6]
    assert nodes(Cluster(1, 2), 32) == [1]


CALLS = ["throughput.dispatch", "throughput.combine", "decoding.dispatch", "decoding.combine"]


def total_us(each, call):
    family, name = call.split(".")
    return getattr(getattr(each, family), name).times.total_us


@pytest.mark.parametrize("call", CALLS)
@given(st.sampled_from([1, 2, 4, 8, 16]), st.floats(5.0, 400.0), st.floats(5.0, 1000.0), st.floats(1.0, 4.0), st.data())
def test_faster_links_and_fewer_tokens_take_no_longer(call, nodes, network, nvlink, factor, data):
    tokens = data.draw(st.integers(2, 2000))
    fewer = data.draw(st.integers(1, tokens - 1))

    def at(links, count):
        case = Case(Cluster(nodes, 2), replace(V3, hidden=256, max_tokens=count))
        return total_us(estimate(case, links, DecodeSizes(count), Sampling()), call)

    time = at(Links(network, nvlink), tokens)
    assert at(Links(network * factor, nvlink), tokens) <= time + 1e-6
    assert at(Links(network, nvlink * factor), tokens) <= time + 1e-6
    # A smaller call may have fewer chunks, and then hides less.
    if call.startswith("decoding"):
        assert at(Links(network, nvlink), fewer) <= time + 1e-6


@given(st.integers(1, 8), st.integers(1, 8))
def test_more_nodes_cost_more(power, per_node):
    experts = 2 ** (power + 1) * per_node

    def at(nodes):
        case = Case(Cluster(nodes, per_node), MoeShape(experts, min(8, experts), 256, 64))
        return estimate(case, LINKS, DecodeSizes(16), Sampling())

    few, many = at(2 ** (power - 1)), at(2**power)
    assert many.throughput.mean_rows.network_out >= few.throughput.mean_rows.network_out
    assert many.decoding.dispatch.network_out_bytes > few.decoding.dispatch.network_out_bytes
    assert many.decoding.memory.network_bytes > few.decoding.memory.network_bytes


def one_node(links, *, tokens, rows):
    """The estimate for the four GPUs of a benchmark."""
    case = Case(Cluster(1, 4), replace(V3, max_tokens=tokens), rows=rows)
    return estimate(case, links, DecodeSizes(min(tokens, 512)), Sampling())


STORES, LOADS = Links(50.0, 356.0), Links(50.0, 330.0)  # measured in the same run


def test_throughput_calls_of_one_node_take_what_was_measured():
    """The constant parts were taken from this file, so this shows that one number fits all sizes, rows and calls."""
    report = json.loads((BENCHMARKS / "2026-11-21_4xh200_0e5c001-calls.json").read_text())
    seen = 0
    for result in report["results"]:
        label, tokens = result["label"], result["label"]["tokens"]
        if (label["who"], label["routing"]) != ("tokenferry", "uniform") or tokens < 512:
            continue
        each = one_node(STORES, tokens=tokens, rows=label["rows"]).throughput
        home = one_node(LOADS, tokens=tokens, rows=label["rows"]).throughput
        modelled = {
            "dispatch, plan kept": each.dispatch.times.kept_us,
            "combine, rows in the group's memory": home.combine.times.kept_us,
        }
        if tokens >= 2048:  # below, the host is what a new routing waits for
            modelled["dispatch"] = each.dispatch.times.total_us
        if label["call"] in modelled:
            seen += 1
            assert result["drained"]["median_us"] / modelled[label["call"]] == pytest.approx(1, abs=0.05), label
    assert seen == 6 * 3 + 4 * 2


def test_decode_calls_of_one_node_take_about_what_was_measured():
    report = json.loads((BENCHMARKS / "2026-11-21_4xh200_f4c8043-decode.json").read_text())
    seen = 0
    for result in report["decode"]:
        rows = {"dispatch fp8": "fp8", "dispatch bf16": "bf16", "combine fast": "bf16"}.get(result["call"].lower())
        if rows is not None:
            family = one_node(STORES, tokens=result["tokens"], rows=rows).decoding
            cost = family.combine if "combine" in result["call"] else family.dispatch
            seen += 1
            ratio = result["graph"]["median_us"] / cost.times.total_us
            assert 0.75 < ratio < 1.1, (result["call"], result["tokens"], ratio)
    assert seen == 3 * 7


V1 = {  # ranks: published GB/s of dispatch and combine, which count the own node
    16: (43, 43),
    32: (58, 57),
    64: (51, 50),
}


@pytest.mark.parametrize("ranks", V1)
def test_published_throughput_of_deep_ep(ranks):
    """DeepEP V1 on H800, NVLink 160 GB/s and network 50, 4096 tokens, at most four nodes a token."""
    nodes = ranks // 8
    each = found(nodes, links=Links(50.0, 160.0), gate=Gate(nodes, min(nodes, 4)))
    for cost, gbs in zip((each.throughput.dispatch, each.throughput.combine), V1[ranks], strict=True):
        published_us = 4096 * each.reach.nodes_per_token * cost.row_bytes / gbs / 1e3
        assert 0.93 < published_us / cost.times.kept_us < 1.3
        assert cost.times.bound_by == ("NVLink" if nodes == 2 else "network")


def test_published_latency_of_deep_ep_is_never_below_its_bytes():
    published = {2: (118, 195), 4: (155, 273), 8: (173, 314), 16: (192, 369), 32: (194, 360)}
    for nodes, (dispatch_us, combine_us) in published.items():
        v1 = found(nodes).deep_ep_v1
        assert 1.2 < dispatch_us / v1.dispatch_us < 1.6
        assert 1.2 < combine_us / v1.combine_us < 1.4
