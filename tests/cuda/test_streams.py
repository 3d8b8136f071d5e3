"""Streams, CUDA graphs and the GIL: what is ordered without the host, and what the host may do meanwhile."""

import gc
import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from support.pairs import Pair
from support.throughput import Deal, all_options, check_delivered, check_plan, check_round_trip, needed, oracle_for
from tokenferry import ArgumentError, CapacityError, Dispatched, DispatchOptions, ExpertGroup, Layout, Routing, Scale
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import same_bits
from tokenferry.testing.oracle import Sent

PAIR = Pair("cuda", "nvlink")
RANKS = 2
CASE = Case((40, 25), 8, 3, hidden=256)
KINDS = ("even", "half_dropped", "all_to_expert_0", "repeated", "nothing", "one_rank_idle")
GAP = 20_000_000
"""Clock cycles, some 10 ms: work queued on a stream before its input is there."""

ON_DEVICE = (
    DispatchOptions(counts="device"),
    DispatchOptions(Layout.EXPERTS, alignment=4, counts="device", zero_padding=True),
    DispatchOptions(Layout.MASKED, counts="device"),
)
by_options = pytest.mark.parametrize("options", ON_DEVICE, ids=lambda options: options.layout.value)


def deal_of(case: Case, options: DispatchOptions, rank: int) -> Deal:
    return Deal(case, options, oracle_for(case, options), rank)


def late(mine: Sent) -> tuple[Tensor, Routing]:
    """Inputs on the device that hold the wrong things until the current stream has waited for a while."""
    pinned = [tensor.pin_memory() for tensor in (mine.x, mine.topk_idx, mine.topk_weights)]
    x, topk_idx, weights = (torch.zeros_like(tensor, device="cuda") for tensor in pinned)
    torch.cuda._sleep(GAP)
    for there, here in zip((x, topk_idx, weights), pinned, strict=True):
        there.copy_(here, non_blocking=True)
    return x, Routing(topk_idx, weights)


def check_sent(deal: Deal, sent: Dispatched) -> None:
    check_delivered(deal, sent, None, [one.topk_weights for one in deal.oracle.sent])
    check_plan(deal, sent)


def echo(deal: Deal, rank: int) -> Tensor:
    """The sums on ``rank`` of a combine that brings home what the dispatch has delivered."""
    tables = []
    for there in range(deal.case.ranks):
        places = [row.place for row in deal.oracle.rows(there)]
        table = torch.full((max(places, default=0) + 1, deal.case.hidden), torch.nan, dtype=deal.case.dtype)
        table[torch.tensor(places, dtype=torch.int64)] = deal.oracle.x(there)
        tables.append(table)
    return deal.oracle.combine(rank, tables)


def check_echo(deal: Deal, home: Tensor) -> None:
    same_bits(f"{deal} echo", home, echo(deal, deal.rank))


def on_a_side_stream(rank, pg) -> None:
    stream = torch.cuda.Stream()
    with PAIR.open(pg, CASE.shape) as group:
        for options in all_options(CASE):
            deal = deal_of(CASE, options, rank)
            with torch.cuda.stream(stream):
                x, routing = late(deal.oracle.sent[rank])
                sent = group.dispatch(x, routing, options=options)
                x.fill_(torch.nan)  # behind the call on its stream: the rows have left
                home = group.combine(sent.x, sent.plan)
            stream.synchronize()
            check_sent(deal, sent)
            check_echo(deal, home.x)


def test_calls_on_a_side_stream(worlds):
    worlds(RANKS, "cuda").run(on_a_side_stream)


def on_turns_of_streams(rank, pg) -> None:
    """Only the group itself orders a call behind the one before."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    with PAIR.open(pg, CASE.shape) as group:
        made = []
        for i in range(9):
            options = ON_DEVICE[i % 3] if i % 2 else replace(ON_DEVICE[i % 3], counts="host")
            deal = deal_of(replace(CASE, seed=i), options, rank)
            with torch.cuda.stream(streams[i % 3]):
                x, routing = late(deal.oracle.sent[rank])
                sent = group.dispatch(x, routing, options=options)
            with torch.cuda.stream(streams[(i + 1) % 3]):
                home = group.combine(sent.x, sent.plan)
            with torch.cuda.stream(streams[(i + 2) % 3]):
                again = group.redispatch(home.x, sent.plan)
            made.append((deal, x, routing, sent, home, again))
        torch.cuda.synchronize()
        for deal, _, _, sent, home, again in made:
            check_sent(deal, sent)
            check_echo(deal, home.x)
            check_delivered(deal, again, [echo(deal, there) for there in range(RANKS)], [None] * RANKS)


def test_consecutive_calls_on_different_streams(worlds):
    worlds(RANKS, "cuda").run(on_turns_of_streams)


def die_under_a_reader(rank, pg) -> set[int]:
    """Results die while another stream has yet to read them; what comes next must not land there too early."""
    other = torch.cuda.Stream()
    addresses = set()
    with PAIR.open(pg, CASE.shape) as group:
        kept = []
        for i in range(8):
            deal = deal_of(replace(CASE, seed=i), DispatchOptions(), rank)
            mine = deal.oracle.sent[rank]
            sent = group.dispatch(mine.x, Routing(mine.topk_idx))
            addresses.add(sent.x.data_ptr())
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                torch.cuda._sleep(GAP)
                kept.append((deal, sent.x.clone()))
                del sent
        torch.cuda.synchronize()
        for deal, x in kept:
            same_bits(f"{deal} x", x, deal.oracle.x(rank))
    return addresses


def test_results_that_die_while_a_stream_reads_them(worlds):
    for addresses in worlds(RANKS, "cuda").run(die_under_a_reader):
        assert len(addresses) < 8, "no memory was used twice: nothing was tried"


def outlive_the_group(rank, pg) -> None:
    group = PAIR.open(pg, CASE.shape)
    deal = deal_of(CASE, DispatchOptions(Layout.EXPERTS, alignment=8), rank)
    mine = deal.oracle.sent[rank]
    sent = group.dispatch(mine.x, Routing(mine.topk_idx, mine.topk_weights), options=deal.options)
    home = group.combine(sent.x, sent.plan)
    kept = sent.x.clone()
    group.close()
    del group
    gc.collect()
    pg.barrier().wait()
    for seed in range(3):
        case = replace(CASE, seed=seed)
        with PAIR.open(pg, case.shape) as other:
            check_round_trip(other, case, DispatchOptions())
    check_sent(deal, sent)
    check_echo(deal, home.x)
    part = sent.x[1:]
    del sent
    gc.collect()
    same_bits("a part of a result", part, kept[1:])


def test_results_outlive_their_group(worlds):
    worlds(RANKS, "cuda").run(outlive_the_group)


def count_while_waiting(rank, pg) -> tuple[int, float]:
    mine = CASE.inputs()[rank]
    ticks, stop = 0, threading.Event()

    def count() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0.001)

    with PAIR.open(pg, CASE.shape) as group:
        group.warmup()
        group.dispatch(mine.x, Routing(mine.topk_idx))
        pg.barrier().wait()
        if rank == 1:
            time.sleep(1.0)
        thread = threading.Thread(target=count)
        thread.start()
        start = time.monotonic()
        group.dispatch(mine.x, Routing(mine.topk_idx))
        took = time.monotonic() - start
        stop.set()
        thread.join()
    return ticks, took


def test_waiting_for_counts_does_not_hold_the_gil(worlds):
    ticks, took = worlds(RANKS, "cuda").run(count_while_waiting)[0]
    assert took > 0.5, "rank 0 did not wait: nothing was tried"
    assert ticks > 50


class Captured:
    """A dispatch and a combine in a CUDA graph, with the inputs that a replay reads."""

    def __init__(self, group: ExpertGroup, case: Case, options: DispatchOptions) -> None:
        mine = case.inputs()[group.rank]
        self.x = torch.zeros_like(mine.x, device=group.device)
        self.routing = Routing(
            torch.full_like(mine.topk_idx, -1, device=group.device),
            torch.zeros_like(mine.topk_weights, device=group.device),
        )
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # which fills the inputs
        with torch.cuda.stream(stream):
            self._calls(group, options)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.sent, self.home = self._calls(group, options)

    def _calls(self, group: ExpertGroup, options: DispatchOptions) -> tuple[Dispatched, Tensor]:
        sent = group.dispatch(self.x, self.routing, options=options)
        return sent, group.combine(sent.x, sent.plan).x

    def replay(self, deal: Deal) -> None:
        mine = deal.oracle.sent[deal.rank]
        self.x.copy_(mine.x)
        self.routing.topk_idx.copy_(mine.topk_idx)
        self.routing.topk_weights.copy_(mine.topk_weights)
        self.graph.replay()

    def check(self, deal: Deal) -> None:
        check_sent(deal, self.sent)
        check_echo(deal, self.home)


def replay(rank, pg, options: DispatchOptions) -> None:
    pick = random.Random(rank)
    with PAIR.open(pg, CASE.shape) as group:
        group.warmup()
        captured = Captured(group, CASE, options)
        for i, routing in enumerate(KINDS):
            deal = deal_of(replace(CASE, routing=routing, seed=i), options, rank)
            if i % 3 == 2:
                time.sleep(pick.random() * 0.05)
            captured.replay(deal)
            torch.cuda.synchronize()
            captured.check(deal)
            if i % 2:  # eager calls between, with counts on the host and on the device
                check_round_trip(group, replace(CASE, seed=10 + i), (DispatchOptions(), options)[i // 2 % 2])
        group.synchronize()


@by_options
def test_replays_with_other_inputs(worlds, options):
    worlds(RANKS, "cuda").run(replay, options)


def replay_without_pause(rank, pg) -> None:
    """Three graphs of one group take turns, and the host never waits."""
    with PAIR.open(pg, CASE.shape) as group:
        group.warmup()
        graphs = [Captured(group, CASE, options) for options in ON_DEVICE]
        seen = []
        for i in range(18):
            captured, options = graphs[i % 3], ON_DEVICE[i % 3]
            deal = deal_of(replace(CASE, routing=KINDS[i % len(KINDS)], seed=i), options, rank)
            captured.replay(deal)
            seen.append((deal, captured.home.clone()))
        torch.cuda.synchronize()
        for deal, home in seen:
            check_echo(deal, home)
        group.synchronize()


def test_graphs_take_turns(worlds):
    worlds(RANKS, "cuda").run(replay_without_pause)


def overflow_in_a_graph(rank, pg) -> None:
    full = replace(CASE, routing="all_to_expert_0")
    tight = needed(full, Layout.ROWS) - 1
    options = DispatchOptions(counts="device", capacity=tight)
    fitting = next(
        case
        for case in (replace(CASE, routing="half_dropped", experts=CASE.experts, seed=seed) for seed in range(50))
        if needed(case, Layout.ROWS) <= tight
    )
    with PAIR.open(pg, CASE.shape) as group:
        group.warmup()
        captured = Captured(group, CASE, options)
        for _ in range(3):
            captured.replay(deal_of(full, options, rank))
            torch.cuda.synchronize()
            with pytest.raises(CapacityError, match=rf"(?s)(?=.*\b{tight}\b)(?=.*\b{tight + 1}\b)"):
                group.synchronize()
            deal = deal_of(fitting, options, rank)
            captured.replay(deal)
            torch.cuda.synchronize()
            group.synchronize()
            captured.check(deal)
        captured.replay(deal_of(full, options, rank))
        torch.cuda.synchronize()
        with pytest.raises(CapacityError):
            group.dispatch(captured.x, captured.routing)
        check_round_trip(group, CASE, DispatchOptions())


def test_an_overflow_in_a_graph_is_raised_by_the_next_eager_call(worlds):
    worlds(RANKS, "cuda").run(overflow_in_a_graph)


def counts_on_the_host_in_a_graph(rank, pg) -> None:
    mine = CASE.inputs()[rank]
    with PAIR.open(pg, CASE.shape) as group:
        group.warmup()
        x, routing = mine.x.to(group.device), Routing(mine.topk_idx.to(group.device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), pytest.raises(ArgumentError, match=r'counts="host".*CUDA graph'):
            group.dispatch(x, routing)
        check_round_trip(group, CASE, DispatchOptions())


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_counts_on_the_host_cannot_be_captured(worlds):
    worlds(RANKS, "cuda").run(counts_on_the_host_in_a_graph)


def decode_in_a_graph(rank, pg, fp8: Scale | None) -> None:
    """A captured iteration gives the same results as the same calls without a graph."""
    case = replace(CASE, tokens=(7, 4))
    x, topk_idx, weights = (
        torch.zeros_like(tensor, device="cuda")
        for tensor in (case.inputs()[rank].x, case.inputs()[rank].topk_idx, case.inputs()[rank].topk_weights)
    )

    def calls() -> tuple[Tensor, Tensor, Tensor]:
        sent = group.decode_dispatch(x, Routing(topk_idx, weights), quantize=fp8)
        rows = sent.x if fp8 is None else sent.x.data.float() * sent.x.scale.repeat_interleave(128, dim=2)
        y = rows.to(torch.bfloat16)
        exact = group.decode_combine(y, sent.plan).x
        return sent.expert_counts, exact, group.decode_combine(y, sent.plan, numerics="fast").x

    with PAIR.open(pg, case.shape) as group:
        group.warmup()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            calls()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = calls()
        for seed in range(4):
            mine = replace(case, seed=seed, routing=KINDS[seed]).inputs()[rank]
            for there, here in zip((x, topk_idx, weights), (mine.x, mine.topk_idx, mine.topk_weights), strict=True):
                there.copy_(here)
            graph.replay()
            got = [tensor.clone() for tensor in captured]
            for name, one, other in zip(("counts", "exact", "fast"), got, calls(), strict=True):
                same_bits(f"rank {rank} seed {seed} {name}", one, other)


@pytest.mark.parametrize("fp8", [None, Scale.FLOAT32])
def test_decoding_in_a_graph(worlds, fp8):
    worlds(RANKS, "cuda").run(decode_in_a_graph, fp8)
