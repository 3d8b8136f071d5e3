"""What crosses the network between nodes is what the cost model counts: one row for each token and other node.

Decode calls on CPUs send filled slots only, so that the rows are those of dispatch and combine.
"""

import contextlib
from dataclasses import dataclass, field
from unittest.mock import patch

import pytest
import torch

from support.pairs import Pair
from tokenferry import Quantized, Routing, Scale
from tokenferry.backends.cpu.exchange import Exchange
from tokenferry.cost.calls import decode_call, sent_slots, slot_weight_bytes, throughput_call
from tokenferry.cost.case import Case, Cluster, Links
from tokenferry.cost.rows import count_rows, network_rows
from tokenferry.layout import Sections
from tokenferry.transports.process_group import ProcessGroupTransport
from tokenferry.types import MoeShape

T, K, H, E = 23, 4, 256, 24
CPU = torch.device("cpu")
CLUSTERS = {4: Cluster(2, 2), 6: Cluster(3, 2)}


def topk_idx_of(rank):
    """The experts of a rank's tokens; some slots are unused, and the last rank has fewer tokens."""
    generator = torch.Generator(CPU).manual_seed(rank)
    scores = torch.rand(T - 5 * (rank == 3), E, generator=generator, dtype=torch.float32, device=CPU)
    chosen = scores.topk(K, dim=1).indices
    chosen[::4, 1:] = -1
    return chosen


@dataclass
class Crossing:
    """What a rank sends along its rail, and all that its process group sends, both by destination rank.

    ``rows`` and ``widths``: in each exchange between nodes.
    """

    rows: list[list[int]] = field(default_factory=list)
    widths: list[tuple[int, ...]] = field(default_factory=list)
    bytes: list[list[int]] = field(default_factory=list)


@contextlib.contextmanager
def watched(crossing):
    """Note what crosses the network meanwhile."""
    start, opened = Exchange.start, ProcessGroupTransport.open

    def watched_start(self, signature, outgoing, **options):
        if signature.leg.startswith("between nodes"):
            crossing.rows.append(list(outgoing.counts))
            crossing.widths.append(outgoing.payload.sections.widths)
        return start(self, signature, outgoing, **options)

    def watched_open(self, call, sizes):
        if any(sizes):
            crossing.bytes.append(list(sizes))
        return opened(self, call, sizes)

    with patch.object(Exchange, "start", watched_start), patch.object(ProcessGroupTransport, "open", watched_open):
        yield


def cross(rank, pg, per_node, quantized):
    """Dispatch and combine; return for each of the two calls what crossed."""
    calls = {"dispatch": Crossing(), "combine": Crossing()}
    topk_idx = topk_idx_of(rank)
    x = torch.ones(len(topk_idx), H, dtype=torch.bfloat16, device=CPU)
    if quantized:
        scale = torch.ones(len(x), H // 128, dtype=torch.float32, device=CPU)
        x = Quantized(x.to(torch.float8_e4m3fn), scale)
    weights = torch.ones(topk_idx.shape, dtype=torch.float32, device=CPU)
    pair = Pair("cpu", "shared_memory+process_group", per_node)
    shape = MoeShape(E, K, H, T)
    with pair.open(pg, shape) as group:
        with watched(calls["dispatch"]):
            sent = group.dispatch(x, Routing(topk_idx, weights))
        y = torch.ones(sent.plan.num_received, H, dtype=torch.bfloat16, device=CPU)
        with watched(calls["combine"]):
            group.combine(y, sent.plan)
        topology = group.topology
    return topology, calls


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("ranks", CLUSTERS)
def test_counted_rows_cross_the_network(worlds, ranks, quantized):
    cluster = CLUSTERS[ranks]
    case = Case(cluster, MoeShape(E, K, H, T), rows="fp8" if quantized else "bf16")
    routing = [topk_idx_of(rank) for rank in range(ranks)]
    expected = count_rows(routing, E, cluster.nodes)
    # Scales travel with the metadata of a row on CPUs.
    data_bytes = {"dispatch": H if quantized else 2 * H, "combine": 2 * H}
    moved = {"dispatch": [0] * ranks, "combine": [0] * ranks}
    for rank, (topology, calls) in enumerate(worlds(ranks).run(cross, cluster.ranks_per_node, quantized)):
        assert topology.nodes == cluster.nodes
        for name, crossing in calls.items():
            ((rows,), ((width, metadata),)) = crossing.rows, crossing.widths
            remote = remote_rows(rank, rows)
            assert width == data_bytes[name]
            assert crossing.bytes == [[Sections((width, metadata)).num_bytes(count) for count in remote]]
            moved[name][rank] = sum(remote)
            if name == "dispatch":
                sent = network_rows(routing[rank], E, topology)
                assert [remote[peer] for peer in topology.rail] == list(sent)
    assert moved["dispatch"] == [each.network_out for each in expected]
    assert moved["combine"] == [each.network_in for each in expected]
    for name, rows in moved.items():
        cost = throughput_call(name, case, expected, Links(50.0, 330.0))
        assert cost.network_out_bytes == max(rows) * cost.row_bytes


COMBINES = {
    "exact": ({}, [(2 * H, 0)]),
    "fast": ({"numerics": "fast"}, [(2 * H, 0)]),
    "fp8": ({"encoding": "fp8"}, [(H, 8)]),
    "logfmt10": ({"encoding": "logfmt10", "numerics": "fast"}, [(H * 10 // 8, 16)]),
}
"""By name, the options of a decode combine, and the bytes of a sum on the way: its data, and scales or ranges."""


def cross_decoding(rank, pg, per_node, quantize):
    calls = {name: Crossing() for name in ("dispatch", *COMBINES)}
    topk_idx = topk_idx_of(rank)
    x = torch.ones(len(topk_idx), H, dtype=torch.bfloat16, device=CPU)
    weights = torch.ones(topk_idx.shape, dtype=torch.float32, device=CPU)
    pair = Pair("cpu", "shared_memory+process_group", per_node)
    with pair.open(pg, MoeShape(E, K, H, T)) as group:
        with watched(calls["dispatch"]):
            sent = group.decode_dispatch(x, Routing(topk_idx, weights), quantize=quantize)
        y = torch.ones((*sent.plan.src_token.shape, H), dtype=torch.bfloat16, device=CPU)
        for name, (options, _) in COMBINES.items():
            with watched(calls[name]):
                group.decode_combine(y, sent.plan, **options)
        return group.topology, calls


@pytest.mark.parametrize("quantize", [None, Scale.FLOAT32])
@pytest.mark.parametrize("ranks", CLUSTERS)
def test_counted_rows_of_decode_calls_cross_the_network(worlds, ranks, quantize):
    cluster = CLUSTERS[ranks]
    case = Case(cluster, MoeShape(E, K, H, T), rows="bf16" if quantize is None else "fp8")
    routing = [topk_idx_of(rank) for rank in range(ranks)]
    expected, links = count_rows(routing, E, cluster.nodes), Links(50.0, 330.0)
    for rank, (topology, calls) in enumerate(worlds(ranks).run(cross_decoding, cluster.ranks_per_node, quantize)):
        out, home = expected[rank].network_out, expected[rank].network_in
        ((rows,), ((width, metadata),)) = calls["dispatch"].rows, calls["dispatch"].widths
        remote = remote_rows(rank, rows)
        assert [remote[peer] for peer in topology.rail] == list(network_rows(routing[rank], E, topology))
        # Scales travel with the metadata of a row on CPUs; ids and tokens take 8 bytes there.
        assert width == (2 * H if quantize is None else H)
        assert metadata == (0 if quantize is None else H // 128 * 4) + 4 * K + 8 * K + 8
        assert calls["dispatch"].bytes == [[Sections((width, metadata)).num_bytes(count) for count in remote]]
        slots, peers = max(remote), cluster.num_nodes - 1
        assert decode_call("dispatch", case, expected, links, slots).network_out_bytes >= out * case.dispatch_row_bytes
        for name, (options, widths) in COMBINES.items():
            (weights, sums), fast = calls[name].rows, options.get("numerics") == "fast"
            assert calls[name].widths == [(4 * K, 0), *widths]
            assert sum(remote_rows(rank, weights)) == (0 if fast else out)
            assert sum(remote_rows(rank, sums)) == home
        model = decode_call("combine", case, expected, links, slots)
        assert model.row_bytes == COMBINES["exact"][1][0][0]
        sent = peers * sent_slots(slots)
        assert model.routing_out_bytes == sent * 4 * K == sent * slot_weight_bytes(case)


def remote_rows(rank, rows):
    return [0 if peer == rank else count for peer, count in enumerate(rows)]
