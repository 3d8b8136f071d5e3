"""Groups of several nodes over NCCL: processes of one host play the nodes, which NCCL joins by sockets.

Two nodes of two ranks need two GPUs, so that each node has NVLink; nodes of one rank share one GPU. This shows that
results are right, and says nothing about rates.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from support import decode_jobs
from support import deep_ep_cuda_jobs as deep_ep_jobs
from support import throughput_jobs as jobs
from support.pairs import NUM_GPUS, Pair
from support.pools import prefer
from support.throughput import check_round_trip
from tokenferry import (
    CapacityError,
    DecodePlan,
    DispatchOptions,
    ExpertGroup,
    Layout,
    MismatchError,
    MoeShape,
    PeerTimeout,
    Routing,
    Scale,
    tuning,
)
from tokenferry.testing.cases import Case
from tokenferry.testing.world import World, WorldError

JOB_S = 300.0
"""Seconds for a job. NCCL connects when it is first used, and ranks that share a GPU take turns on it."""
TWO_BY_TWO = pytest.param((4, 2), marks=pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs"))
NODES = [TWO_BY_TWO, (2, 1), (3, 1), (4, 1)]
"""Ranks, and ranks of a node."""
if NUM_GPUS >= 4:
    NODES += [(8, 4), (8, 2)]


def pair_of(per_node: int) -> Pair:
    return Pair("cuda", "nccl" if per_node == 1 else "nvlink+nccl", ranks_per_node=per_node)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Callable[..., list[Any]]]:
    """``nodes((ranks, per_node), job, *args)``: call ``job(rank, process_group, pair, *args)`` on every rank."""
    worlds: dict[tuple[int, int], World] = {}

    def run(size: tuple[int, int], job: Callable[..., Any], *args: object) -> list[Any]:
        ranks, per_node = size
        if size not in worlds or not worlds[size].alive:
            worlds[size] = World(ranks, devices="cuda", timeout_s=JOB_S, ranks_per_node=per_node)
            worlds[size].run(prefer, "cuda")
        return worlds[size].run(job, pair_of(per_node), *args)

    yield run
    for world in worlds.values():
        world.close()


at_nodes = pytest.mark.parametrize("size", NODES, ids=lambda size: f"{size[0] // size[1]}x{size[1]}")


# ---------------------------------------------------------------------- calls


def first_calls(rank: int, pg: dist.ProcessGroup, pair: Pair) -> None:
    """As small as calls can be: each token goes to a rank of the own node and to one of another."""
    ranks = pg.size()
    with pair.open(pg, MoeShape(ranks, 2, 64, 16), timeout_s=60) as group:
        group.warmup()
        x = torch.full((3, 64), float(rank + 1), dtype=torch.bfloat16)
        index = torch.tensor([[rank, (rank + ranks // 2) % ranks], [-1, rank], [0, ranks - 1]])
        for counts in ("host", "device"):
            sent = group.dispatch(x, Routing(index), options=DispatchOptions(counts=counts))
            again = group.redispatch(x, sent.plan)
            home = group.combine(sent.x, sent.plan).x
            group.synchronize()
            num = int(sent.plan.src_counts.sum())
            assert again.x[:num].equal(sent.x[:num])
            assert home[:, 0].tolist() == [2.0 * (rank + 1), rank + 1, 2.0 * (rank + 1)]


@at_nodes
def test_first_calls(nodes, size):
    nodes(size, first_calls)


@at_nodes
def test_round_trips(nodes, size):
    nodes(size, jobs.round_trips, size[0])


@pytest.mark.parametrize("job", [jobs.quantized_rows, jobs.overflow])
@pytest.mark.parametrize("size", [TWO_BY_TWO, (2, 1)], ids=["2x2", "2x1"])
def test_the_rest_of_the_throughput_calls(nodes, size, job):
    nodes(size, job, size[0])


@pytest.mark.parametrize("job", [jobs.plans_in_other_views, jobs.many_plans])
def test_plans_of_other_times_and_views(nodes, job):
    nodes((3, 1), job)


def in_chunks(rank: int, pg: dist.ProcessGroup, pair: Pair) -> None:
    """Rows of some megabytes cross in several chunks; the smallest of them in no more than have tokens."""
    ranks, chunk_bytes = pg.size(), tuning.RAIL_CHUNK_BYTES
    tuning.RAIL_CHUNK_BYTES = 1 << 16
    try:
        for tokens in ((300, 0, 1, 128)[:ranks], (2, 3, 700, 1)[:ranks]):
            case = Case(tokens, 4 * ranks, 4, hidden=512, routing="half_dropped")
            with pair.open(pg, case.shape) as group:
                for options in (DispatchOptions(), DispatchOptions(Layout.EXPERTS), DispatchOptions(counts="device")):
                    check_round_trip(group, case, options)
    finally:
        tuning.RAIL_CHUNK_BYTES = chunk_bytes


@pytest.mark.parametrize("size", [TWO_BY_TWO, (2, 1)], ids=["2x2", "2x1"])
def test_rows_in_chunks(nodes, size):
    nodes(size, in_chunks)


def first_decode_calls(rank: int, pg: dist.ProcessGroup, pair: Pair) -> None:
    """As small as calls can be: each token goes to a rank of the own node and to one of another."""
    ranks = pg.size()
    with pair.open(pg, MoeShape(ranks, 2, 64, 16), timeout_s=60) as group:
        group.warmup()
        x = torch.full((3, 64), float(rank + 1), dtype=torch.bfloat16)
        index = torch.tensor([[rank, (rank + ranks // 2) % ranks], [-1, rank], [0, ranks - 1]])
        for hook in (False, True):
            sent = group.decode_dispatch(x, Routing(index, torch.ones(3, 2)), return_hook=hook)
            sent.hook()
            for numerics in ("exact", "fast"):
                home = group.decode_combine(sent.x, sent.plan, numerics=numerics, return_hook=hook)
                home.hook()
                group.synchronize()
                assert home.x[:, 0].tolist() == [2.0 * (rank + 1), rank + 1, 2.0 * (rank + 1)]


@at_nodes
def test_first_decode_calls(nodes, size):
    nodes(size, first_decode_calls)


@at_nodes
def test_decode_rounds(nodes, size):
    nodes(size, decode_jobs.rounds, size[0])


@pytest.mark.parametrize("job", [decode_jobs.encodings, decode_jobs.hooks_in_any_order])
@pytest.mark.parametrize("size", [TWO_BY_TWO, (2, 1)], ids=["2x2", "2x1"])
def test_the_rest_of_the_decode_calls(nodes, size, job):
    nodes(size, job, size[0])


def overflow(rank: int, pg: dist.ProcessGroup, pair: Pair) -> None:
    """The last rank has more tokens for node 0 than slots: all raise, and the group stays usable."""
    ranks, last = pg.size(), pg.size() - 1
    with pair.open(pg, MoeShape(ranks, 2, 64, 16, node_slots=2), timeout_s=60) as group:
        x, weights = torch.ones(3, 64, dtype=torch.bfloat16), torch.ones(3, 2)
        for many in (True, False):
            index = (
                torch.tensor([[0, -1]] * 3) if rank == last and many else torch.tensor([[0, last], [last, 0], [-1, -1]])
            )
            sent = group.decode_dispatch(x, Routing(index, weights))
            if many:
                with pytest.raises(CapacityError, match=rf"rank {last} has 3 tokens for one other node"):
                    group.synchronize()
            else:
                assert group.decode_combine(sent.x, sent.plan).x[:, 0].tolist() == [2.0, 2.0, 0.0]
                group.synchronize()


@pytest.mark.parametrize("size", [TWO_BY_TWO, (2, 1)], ids=["2x2", "2x1"])
def test_an_overflow_of_slots(nodes, size):
    nodes(size, overflow)


def deep_ep(rank: int, pg: dist.ProcessGroup, pair: Pair, job: str, case: Case) -> None:
    """Make calls of DeepEP's Buffer; the ranks of a world that play nodes have them in its groups, too."""
    deep_ep_jobs.as_on_the_cpu(rank, pg, job, case)


@pytest.mark.parametrize("job", ["round_trip", "worst_tokens", "without_experts", "internode_calls", "backward"])
@pytest.mark.parametrize("size", [TWO_BY_TWO, (2, 1)], ids=["2x2", "2x1"])
def test_deep_ep(nodes, size, job):
    ranks = size[0]
    # On GPUs num_worst_tokens has to hold R times the most tokens of a rank.
    tokens = (3,) * ranks if job == "worst_tokens" else (3, 2, 0, 5)[:ranks]
    nodes(size, deep_ep, job, Case(tokens, 2 * ranks, 3, hidden=16))


# ---------------------------------------------------------------------- CUDA graphs


def captured(rank: int, pg: dist.ProcessGroup, pair: Pair, layout: Layout) -> None:
    """Replay dispatch, redispatch and combine with other rows and another routing, between eager calls."""
    ranks, device = pg.size(), pair.device
    with pair.open(pg, MoeShape(2 * ranks, 3, 256, 64)) as group:
        options = DispatchOptions(layout, counts="device")
        x = torch.randn(40, 256, device=device, dtype=torch.bfloat16)
        index = torch.zeros(40, 3, device=device, dtype=torch.int64)

        def calls() -> torch.Tensor:
            sent = group.dispatch(x, Routing(index), options=options)
            again = group.redispatch(x, sent.plan)
            return group.combine(again.x, sent.plan).x

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            calls()
        torch.cuda.synchronize()
        pg.barrier().wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            out = calls()
        for seed in range(3):
            make = torch.Generator().manual_seed(10 * seed + rank)
            index.copy_(torch.stack([torch.randperm(2 * ranks, generator=make)[:3] for _ in range(40)]))
            x.copy_(torch.randn(40, 256, generator=make))
            want = calls().clone()
            group.synchronize()
            graph.replay()
            torch.cuda.synchronize()
            assert out.equal(want), f"replay {seed}"
        group.synchronize()


@pytest.mark.parametrize("layout", [Layout.ROWS, Layout.EXPERTS])
@pytest.mark.parametrize("size", [TWO_BY_TWO, (2, 1)], ids=["2x2", "2x1"])
def test_cuda_graphs(nodes, size, layout):
    nodes(size, captured, layout)


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("quantize", [None, Scale.FLOAT32])
@pytest.mark.parametrize("size", [TWO_BY_TWO, (2, 1)], ids=["2x2", "2x1"])
def test_cuda_graphs_of_decode_calls(nodes, size, quantize, hooks):
    nodes(size, decode_jobs.captured, quantize, hooks)


# ---------------------------------------------------------------------- what goes wrong


def one_is_silent(rank: int, pg: dist.ProcessGroup, pair: Pair, call: str) -> None:
    """The last rank does not call: the others name it in time, their contexts live, and a new group works."""
    ranks, lost = pg.size(), pg.size() - 1
    with pair.open(pg, MoeShape(ranks, 2, 64, 16), timeout_s=4) as group:
        group.warmup()
        x, routing = torch.ones(2, 64), Routing(torch.tensor([[0, ranks - 1], [1, 0]]))
        plan = group.dispatch(x, routing).plan
        group.synchronize()
        pg.barrier().wait()
        if rank != lost:
            start = time.monotonic()
            with pytest.raises(PeerTimeout) as caught:  # noqa: PT012 - combine returns at once
                if call == "dispatch":
                    group.dispatch(x, routing)
                else:
                    group.combine(torch.ones(plan.num_delivered, 64), plan)
                if call == "combine, empty_cache":  # frees memory, for which CUDA waits until the device is idle
                    torch.empty(1 << 26, dtype=torch.uint8, device=pair.device)
                    torch.cuda.empty_cache()
                group.synchronize()
            waited_s = time.monotonic() - start
            assert caught.value.peers == (lost,), caught.value
            assert caught.value.nodes == (lost // pair.ranks_per_node,)
            assert waited_s < 20, f"{waited_s} s: {caught.value}"
        pg.barrier().wait()
    assert torch.ones(3, device=pair.device).sum().item() == 3.0
    first_calls(rank, pg, pair)


@pytest.mark.parametrize("call", ["dispatch", "combine", "combine, empty_cache"])
@pytest.mark.parametrize("size", [TWO_BY_TWO, (2, 1)], ids=["2x2", "2x1"])
def test_a_silent_rank(nodes, size, call):
    nodes(size, one_is_silent, call)


def one_is_silent_in_a_replay(rank: int, pg: dist.ProcessGroup, pair: Pair) -> None:
    """The last rank does not replay what all have captured: the others' replays end, and the error names it."""
    ranks, lost, device = pg.size(), pg.size() - 1, pair.device
    with pair.open(pg, MoeShape(ranks, 2, 64, 16), timeout_s=4) as group:
        group.warmup()
        x = torch.ones(2, 64, dtype=torch.bfloat16, device=device)
        routing = Routing(torch.tensor([[0, ranks - 1], [1, 0]], device=device))
        options = DispatchOptions(counts="device")

        def calls() -> torch.Tensor:
            sent = group.dispatch(x, routing, options=options)
            return group.combine(sent.x, sent.plan).x

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            calls()
        torch.cuda.synchronize()
        pg.barrier().wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            calls()
        graph.replay()
        torch.cuda.synchronize()
        pg.barrier().wait()
        if rank != lost:
            start = time.monotonic()
            graph.replay()
            torch.cuda.synchronize()
            assert time.monotonic() - start < 20
            with pytest.raises(PeerTimeout) as caught:
                group.synchronize()
            assert caught.value.peers == (lost,), caught.value
        pg.barrier().wait()
    first_calls(rank, pg, pair)


@pytest.mark.parametrize("size", [TWO_BY_TWO, (2, 1)], ids=["2x2", "2x1"])
def test_a_rank_that_is_silent_in_a_replay(nodes, size):
    nodes(size, one_is_silent_in_a_replay)


def one_dies(rank: int, pg: dist.ProcessGroup, pair: Pair, counts: str) -> tuple[int, ...]:
    """The process of the last rank is killed during a call: the others find out, and their contexts live."""
    ranks, lost = pg.size(), pg.size() - 1
    with pair.open(pg, MoeShape(ranks, 2, 4096, 1024), timeout_s=60) as group:
        group.warmup()
        x, routing = torch.ones(1024, 4096), Routing(torch.tensor([[0, ranks - 1]] * 1024))
        group.dispatch(x, routing)
        group.synchronize()
        pg.barrier().wait()
        if rank == lost:
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(PeerTimeout) as caught:  # noqa: PT012 - with counts on the device, the call returns
            while True:
                group.dispatch(x, routing, options=DispatchOptions(counts=counts))
                group.synchronize()
        waited_s = time.monotonic() - start
        assert waited_s < 30, f"{waited_s} s: {caught.value}"
    assert torch.ones(3, device=pair.device).sum().item() == 3.0
    return caught.value.peers


@pytest.mark.parametrize("counts", ["host", "device"])
@pytest.mark.parametrize("size", [TWO_BY_TWO, (2, 1)], ids=["2x2", "2x1"])
def test_a_process_that_is_killed(nodes, size, counts):
    with pytest.raises(WorldError) as caught:
        nodes(size, one_dies, counts)
    lost = size[0] - 1
    assert set(caught.value.errors) == {lost}, caught.value
    assert caught.value.results == dict.fromkeys(range(lost), (lost,)), "another rank is named"


DECODE_CALLS = {
    "decode_dispatch": lambda group, x, routing, plan: group.decode_dispatch(x, routing),
    "exact decode_combine": lambda group, x, routing, plan: group.decode_combine(rows_for(plan), plan),
    "fast decode_combine": lambda group, x, routing, plan: group.decode_combine(rows_for(plan), plan, numerics="fast"),
}


def rows_for(plan: DecodePlan) -> torch.Tensor:
    return torch.ones(*plan.src_token.shape, 64, device=plan.src_token.device)


def one_is_silent_in_decoding(rank: int, pg: dist.ProcessGroup, pair: Pair, call: str, replayed: bool) -> None:
    """The last rank does not call, or does not replay: the others name it in time, and a new group works."""
    ranks, lost, device = pg.size(), pg.size() - 1, pair.device
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with pair.open(pg, MoeShape(ranks, 2, 64, 16), timeout_s=4) as group:
        group.warmup()
        index = torch.tensor([[0, ranks - 1], [1, 0]], device=device)
        x, routing = torch.ones(2, 64, device=device), Routing(index, torch.ones(2, 2, device=device))
        plan = group.decode_dispatch(x, routing).plan
        DECODE_CALLS[call](group, x, routing, plan)
        group.synchronize()
        pg.barrier().wait()
        if replayed:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                DECODE_CALLS[call](group, x, routing, plan)
            graph.replay()
            torch.cuda.synchronize()
            group.synchronize()
            pg.barrier().wait()
        if rank != lost:
            start = time.monotonic()
            with pytest.raises(PeerTimeout) as caught:  # noqa: PT012 - calls return at once
                if replayed:
                    graph.replay()
                    torch.cuda.synchronize()
                else:
                    DECODE_CALLS[call](group, x, routing, plan)
                group.synchronize()
            waited_s = time.monotonic() - start
            assert caught.value.peers == (lost,), caught.value
            assert waited_s < 20, f"{waited_s} s: {caught.value}"
        pg.barrier().wait()
    assert torch.ones(3, device=pair.device).sum().item() == 3.0
    first_decode_calls(rank, pg, pair)


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("call", DECODE_CALLS)
@pytest.mark.parametrize("size", [TWO_BY_TWO, (2, 1)], ids=["2x2", "2x1"])
def test_a_silent_rank_in_decode_calls(nodes, size, call, replayed):
    nodes(size, one_is_silent_in_decoding, call, replayed)


def other_calls(group: ExpertGroup, differ: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a call of node 0, and one of the other nodes, whose exchange does not end."""
    ranks, x = group.num_ranks, torch.ones(16, 8192)
    far, near = (Routing(torch.tensor([each] * 16), torch.ones(16, 2)) for each in ([0, ranks - 1], [group.rank, -1]))
    plan, other = group.dispatch(x, far).plan, group.dispatch(x, near).plan
    on_device = DispatchOptions(counts="device")
    return {
        "kinds": (lambda: group.dispatch(x, far), lambda: group.combine(torch.ones(plan.num_delivered, 8192), plan)),
        "kinds, counts on the device": (
            lambda: group.dispatch(x, far, options=on_device),
            lambda: group.combine(torch.ones(plan.num_delivered, 8192), plan),
        ),
        "plans": (lambda: group.redispatch(x, other), lambda: group.redispatch(x, plan)),
        "plans of sums": (
            lambda: group.combine(torch.ones(plan.num_delivered, 8192), plan),
            lambda: group.combine(torch.ones(other.num_delivered, 8192), other),
        ),
        "formats": (
            lambda: group.decode_dispatch(x.bfloat16(), far, quantize=Scale.FLOAT32),
            lambda: group.decode_dispatch(x.bfloat16(), far),
        ),
    }[differ]


def different_calls(rank: int, pg: dist.ProcessGroup, pair: Pair, differ: str) -> None:
    """All ranks find out soon that the nodes have made different calls, and a new group works."""
    with pair.open(pg, MoeShape(pg.size(), 2, 8192, 16), timeout_s=60) as group:
        group.warmup()
        calls = other_calls(group, differ)
        group.synchronize()
        pg.barrier().wait()
        start = time.monotonic()
        with pytest.raises(MismatchError) as caught:  # noqa: PT012 - some raise with the next call
            calls[rank >= pair.ranks_per_node]()
            group.synchronize()
        waited_s = time.monotonic() - start
        assert waited_s < 20, f"{waited_s} s: {caught.value}"
        pg.barrier().wait()
    first_calls(rank, pg, pair)


@pytest.mark.parametrize("differ", ["kinds", "kinds, counts on the device", "plans", "plans of sums", "formats"])
@pytest.mark.parametrize("size", [TWO_BY_TWO, (2, 1)], ids=["2x2", "2x1"])
def test_different_calls_on_two_nodes(nodes, size, differ):
    nodes(size, different_calls, differ)
