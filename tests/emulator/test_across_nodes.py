"""Dispatch, redispatch and combine of the CUDA backend across nodes, on the emulator."""

import copy
import os
import pickle
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from support import throughput_jobs
from support.ambient import STATES
from support.emulated_group import EmulatedPair, in_each, in_processes
from support.emulated_rails import QueueRails, QueueTransfer, elsewhere
from support.emulator import Emulator
from support.guess_jobs import check_sent, send
from support.throughput import (
    Deal,
    all_options,
    check_combine,
    check_redispatch,
    check_round_trip,
    oracle_for,
    routing_of,
)
from tokenferry import ExpertGroup, MoeShape, tuning
from tokenferry.autograd.ops import _apart, plan_of, tensors_of
from tokenferry.backends.cuda.across.backend import AcrossBackend
from tokenferry.backends.cuda.across.rails import Parts, Transfer
from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate
from tokenferry.bench.suites.nodes import rows_across
from tokenferry.bench.suites.nodes_bytes import sent_across
from tokenferry.errors import ArgumentError, ClosedError, MismatchError, PeerTimeout, RoutingError
from tokenferry.memory.streams import HostStreams
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import same_bits
from tokenferry.transports.base import CallId, peer_timeout
from tokenferry.tuning import NCCL_SMS
from tokenferry.types import DispatchOptions, Layout, Plan, Quantized, Routing

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))

NODES = [(4, 2), (6, 2), (3, 1)]
"""Ranks, and ranks of a node."""


@pytest.mark.parametrize(("ranks", "per_node"), NODES)
def test_round_trips(run, ranks, per_node):
    run(ranks, throughput_jobs.round_trips, ranks, ranks_per_node=per_node)


def test_round_trips_whose_routing_crosses_later(run, monkeypatch):
    """In the size that it has, when that is known: of M tokens it would be too large."""
    monkeypatch.setattr(tuning, "ROUTING_AT_ONCE_BYTES", 0)
    run(4, throughput_jobs.round_trips, 4, ranks_per_node=2)


def many_tokens(rank: int, pg: None, pair: EmulatedPair) -> None:
    """Segments of several units, and of one that is exactly full."""
    for tokens in ((140, 0, 129, 300), (128, 128, 256, 1)):
        case = Case(tokens, 12, 3, hidden=8, routing="half_dropped")
        with pair.open(pg, case.shape) as group:
            for options in (DispatchOptions(Layout.EXPERTS), DispatchOptions(counts="device")):
                check_round_trip(group, case, options)


def test_many_tokens(run):
    run(4, many_tokens, ranks_per_node=2)


def in_chunks(rank: int, pg: None, pair: EmulatedPair, ranks: int) -> None:
    for case in (
        Case((30, 0, 9, 3)[:ranks], 12, 3, hidden=8, routing="half_dropped"),
        Case((2, 5, 1, 40)[-ranks:], 12, 4, dtype=torch.float32, routing="repeated"),
    ):
        with pair.open(pg, case.shape) as group:
            for options in all_options(case)[::5]:
                check_round_trip(group, case, options)


@pytest.mark.parametrize(("ranks", "per_node"), [(4, 2), (3, 1), (4, 1)])
def test_rows_in_chunks(run, monkeypatch, ranks, per_node):
    """Some are empty; tokens of one rank and node are in several. With three nodes, one step of two has chunks."""
    monkeypatch.setattr(tuning, "RAIL_CHUNK_BYTES", 64)
    run(ranks, in_chunks, ranks, ranks_per_node=per_node)


@pytest.mark.parametrize("job", [throughput_jobs.quantized_rows, throughput_jobs.overflow])
def test_the_rest_of_the_throughput_calls(run, job):
    run(4, job, 4, ranks_per_node=2)


@pytest.mark.parametrize("job", [throughput_jobs.plans_in_other_views, throughput_jobs.many_plans])
def test_plans_of_other_times_and_views(run, job):
    run(3, job, ranks_per_node=1)


def test_rows_may_begin_anywhere(run):
    run(2, throughput_jobs.rows_that_begin_anywhere, ranks_per_node=1)


# ---------------------------------------------------------------------- plans


def copies(plan: Plan) -> list[Plan]:
    """Return copies of a plan, made as programs and `tokenferry.autograd` make them."""
    tensors = _apart(tensors_of(plan))
    through_ops = plan_of(tensors, plan.group_key, plan.options, plan.num_tokens, plan.num_delivered)
    return [copy.copy(plan), pickle.loads(pickle.dumps(plan)), through_ops]


def use_copies(rank: int, pg: None, pair: EmulatedPair) -> None:
    case = Case((6, 0, 9, 3), 8, 3, dtype=torch.float32, routing="half_dropped")
    with pair.open(pg, case.shape) as group:
        for options in (DispatchOptions(), DispatchOptions(Layout.EXPERTS, alignment=4, zero_padding=True)):
            deal = Deal(case, options, oracle_for(case, options), rank)
            mine = deal.oracle.sent[rank]
            sent = group.dispatch(mine.x, routing_of(mine), options=options)
            for plan in copies(sent.plan):
                assert plan._host_sizes == sent.plan._host_sizes
                like = SimpleNamespace(x=sent.x, plan=plan)
                check_combine(group, deal, like, None, 1, False, True)
                check_redispatch(group, deal, like)
            traced = replace(sent.plan, _host_sizes=None)
            check_combine(group, deal, SimpleNamespace(x=sent.x, plan=traced), None, 1, False, True)


@pytest.mark.usefixtures("both_paths")
def test_copies_of_plans(run):
    """What a plan knows about other nodes survives whatever a plan may go through."""
    run(4, use_copies, ranks_per_node=2)


# ---------------------------------------------------------------------- counts on the device


def without_waiting(rank: int, pg: None, pair: EmulatedPair) -> None:
    case = Case((6, 0, 9, 3), 8, 3, dtype=torch.float32, routing="half_dropped")
    with pair.open(pg, case.shape) as group:
        for layout in Layout:
            deal = Deal(case, (options := DispatchOptions(layout, counts="device")), oracle_for(case, options), rank)
            mine = deal.oracle.sent[rank]
            sent = group.dispatch(mine.x, routing_of(mine), options=options)
            check_combine(group, deal, sent, None, 1, False, True)
            check_redispatch(group, deal, sent)


def test_the_host_does_not_wait(run):
    """With counts on the device: such calls can be captured."""
    waits = AssertionError("the host waits")
    with (
        mock.patch.object(Context, "wait_for_words", side_effect=waits),
        mock.patch.object(Context, "wait_for_counts", side_effect=waits),
        mock.patch.object(QueueTransfer, "wait", side_effect=waits),
    ):
        run(4, without_waiting, ranks_per_node=2)


def capture(rank: int, pg: None, pair: EmulatedPair) -> None:
    with pair.open(pg, SHAPE) as group:
        for options in (DispatchOptions(), DispatchOptions(counts="device", capacity=4)):
            with pytest.raises(ArgumentError, match=r"graph cannot capture; use .*device.* without a capacity"):
                group.dispatch(torch.ones(2, 16), Routing(torch.tensor([[0, 3], [1, 2]])), options=options)


def test_what_a_graph_cannot_capture(run):
    with mock.patch.object(HostStreams, "capture", return_value=7):
        run(2, capture, ranks_per_node=1)


def warm_up(rank: int, pg: None, pair: EmulatedPair, late: int, warm: list[int]) -> None:
    with pair.open(pg, SHAPE) as group:
        if rank == late:
            time.sleep(0.5)
            assert not warm, "a rank has not waited for all others"
        group.warmup()
        warm.append(rank)


def test_warmup_waits_for_all_ranks(run):
    run(4, warm_up, 3, [], ranks_per_node=2)


def without_most(rank: int, pg: None, pair: EmulatedPair) -> None:
    with pair.open(pg, SHAPE) as group:
        for tokens in ((4, 7, 2, 1), (40, 3, 0, 1)):
            case = Case(tokens, 8, 2, dtype=torch.float32)
            check_sent(group, case, send(group, case))


def test_rows_without_a_most_of_tokens(run):
    """As the DeepEP API dispatches: nobody knows M."""
    run(4, without_most, ranks_per_node=2)


CPU = torch.device("cpu")


def in_a_state(rank: int, pg: None, pair: EmulatedPair, name: str | None) -> list[torch.Tensor]:
    """Return what calls give while a thread has a state of torch; ``name``: which one, or None."""
    found = []
    with STATES[name].of_a_thread("cpu") if name else nullcontext(), pair.open(pg, SHAPE) as group:
        x = torch.arange(48, dtype=torch.float32, device=CPU).view(3, 16) + 100 * rank
        index = torch.tensor([[0, 3], [1, 2], [2, -1]], dtype=torch.int64, device=CPU)
        weights = torch.ones(3, 2, dtype=torch.float32, device=CPU)
        for counts in ("host", "device"):
            sent = group.dispatch(x, Routing(index, weights), options=DispatchOptions(counts=counts))
            again = group.redispatch(x, sent.plan, topk_weights=weights)
            num = int(sent.plan.src_counts.sum())
            home = group.combine(sent.x, sent.plan, topk_weights=sent.topk_weights, bias=x)
            found += [sent.x[:num], again.x[:num], home.x, home.topk_weights]
    return [tensor.clone() for tensor in found]


@pytest.mark.parametrize("name", STATES)
def test_the_state_of_torch_has_no_say(run, name):
    plain = run(4, in_a_state, None, ranks_per_node=2)
    with STATES[name].of_the_process():
        found = run(4, in_a_state, name, ranks_per_node=2)
    for got, want in zip(found, plain, strict=True):
        for one, other in zip(got, want, strict=True):
            same_bits(name, one, other)


# ---------------------------------------------------------------------- layouts of the DeepEP API


def layouts(rank: int, pg: None, pair: EmulatedPair) -> None:
    with pair.open(pg, SHAPE) as group:
        index = torch.tensor([[0, 3], [1, 2], [2, -1], [3, 3]])
        found, want = group._token_layout(index, 4), [[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
        assert found.in_rank.int().tolist() == want
        assert (found.per_rank.tolist(), found.per_expert.tolist()) == ([1, 1, 2, 2], [1, 1, 2, 2])
        assert found.per_node.tolist() == [2, 4]
        in_rank = found.in_rank.clone()
        in_rank[1, 2] = False
        assert group._restricted(index, in_rank, 4).tolist() == [[0, 3], [1, -1], [2, -1], [3, 3]]


def test_layouts_of_all_ranks(run):
    run(4, layouts, ranks_per_node=2)


def few_sms(rank: int, pg: None, pair: EmulatedPair) -> None:
    with pair.open(pg, SHAPE) as group:
        group._backend.context.num_sms = 20
        sent = group.dispatch(torch.ones(2, 16), Routing(torch.tensor([[0, 3], [1, 2]])), num_sms=20)
        group.combine(sent.x, sent.plan, num_sms=20)


def test_nccl_has_sms_left(run):
    """Each call asks for all SMs; kernels that wait for others leave some."""
    grids, launch = [], LaunchTemplate.launch

    def watched(template: LaunchTemplate, grid: int, stream: int) -> None:
        if template.kernel.spec.name in ("dispatch", "combine_push"):
            grids.append(grid)
        launch(template, grid, stream)

    with mock.patch.object(LaunchTemplate, "launch", watched):
        run(2, few_sms, ranks_per_node=1)
    assert len(grids) == 8, "two ranks, two calls, two nodes"
    assert set(grids) == {20 - NCCL_SMS}


def in_few_chunks(rank: int, pg: None, pair: EmulatedPair, tokens: tuple[int, ...]) -> None:
    with pair.open(pg, MoeShape(4, 2, 16, 1024)) as group:
        x = torch.ones(tokens[rank], 16)
        index = torch.tensor([[0, 2]]).expand(tokens[rank], 2).contiguous()  # all go to both nodes
        plan = group.dispatch(x, Routing(index)).plan
        group.redispatch(x, plan)
        group.combine(torch.ones(plan.num_delivered, 16), plan)


@pytest.mark.parametrize(
    ("tokens", "chunks"),
    [((0, 0, 0, 0), 1), ((4, 0, 100, 7), 1), ((4, 300, 1, 7), 3), ((1000, 2, 0, 1), 6)],
)
def test_chunks_in_which_no_rank_has_tokens_are_passed_over(run, monkeypatch, tokens, chunks):
    """All ranks of a node launch as many kernels as the one with the most tokens, in units of 128, needs."""
    monkeypatch.setattr(tuning, "rail_chunks", lambda num, *_: tuple(range(0, num, 128)))  # of 768 tokens: six chunks
    launches, launch = [], LaunchTemplate.launch

    def watched(template: LaunchTemplate, grid: int, stream: int) -> None:
        launches.append(template.kernel.spec.name)
        launch(template, grid, stream)

    with mock.patch.object(LaunchTemplate, "launch", watched):
        run(4, in_few_chunks, tokens, ranks_per_node=2)
    own = 4  # of each rank, in each call
    assert launches.count("dispatch") == 2 * (own + 4 * chunks)
    assert launches.count("combine_push") == own + 4 * chunks


def uneven(rank: int, pg: None, pair: EmulatedPair) -> None:
    """Rank 3 has many tokens, for its own node; ranks 0 and 2 exchange a few."""
    with pair.open(pg, MoeShape(4, 2, 16, 1024), timeout_s=LOSS_S) as group:
        tokens = (20, 0, 20, 1000)[rank]
        index = torch.tensor([[2, 3] if rank == 3 else [0, 2]]).expand(tokens, 2).contiguous()
        x = torch.arange(tokens * 16, dtype=torch.float32).view(tokens, 16) + rank
        sent = group.dispatch(x, Routing(index))
        again = group.redispatch(x, sent.plan)
        assert torch.equal(again.x, sent.x)
        assert torch.equal(group.combine(again.x, sent.plan).x, 2 * x)


def test_headers_go_with_the_same_rows_on_both_nodes(run, monkeypatch):
    """Though one node has more tokens than the other one, and looks at more chunks."""
    monkeypatch.setattr(tuning, "rail_chunks", lambda *_: (0, 200, 400))
    run(4, uneven, ranks_per_node=2)


# ---------------------------------------------------------------------- what crosses


CROSSING = torch.tensor([[0, 1], [0, 4], [4, 7], [3, 6], [-1, -1]])
"""Of five tokens of each rank three go to the other node, whatever node they come from."""


def count_bytes(rank: int, pg: None, pair: EmulatedPair) -> tuple[int, int, int]:
    """Return the bytes that a rank sends to the other node in a dispatch, a redispatch and a combine."""
    H, index = 32, CROSSING if rank < 2 else torch.where(CROSSING < 0, -1, 7 - CROSSING)
    with pair.open(pg, MoeShape(8, 2, H, 8)) as group:
        backend = group._backend
        assert isinstance(backend, AcrossBackend)
        counted = []

        def count(call: Callable[[], Any]) -> None:
            before = backend._rails.num_bytes
            as_the_benchmark = sent_across(group, call)
            counted.append(backend._rails.num_bytes - before)
            assert as_the_benchmark == counted[-1]

        x, plans = Quantized(torch.ones(5, H, dtype=torch.uint8), torch.ones(5, 3)), []
        count(lambda: plans.append(group.dispatch(x, Routing(index, torch.ones(5, 2))).plan))
        (plan,) = plans
        assert rows_across(plan, group.topology) == 3, "as the benchmark counts them"
        count(lambda: group.redispatch(torch.ones(5, H, dtype=torch.bfloat16), plan))
        count(lambda: group.combine(torch.ones(plan.num_delivered, H, dtype=torch.bfloat16), plan))
        assert "exchange" not in vars(backend._rails), "nobody counts any more"
        return tuple(counted)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_row_crosses_once_for_each_node(run, monkeypatch, at_once):
    """However many ranks want it there. Dispatch: header, ids and token numbers, rows with scales and weights.

    Ids and token numbers are those of M tokens, and if these are too many, of the tokens that cross.
    """
    if not at_once:
        monkeypatch.setattr(tuning, "ROUTING_AT_ONCE_BYTES", 0)
    rows, header, routing, state = 3, 68, (8 if at_once else 3) * (2 * 2 + 4), 8
    want = (header + routing + rows * (32 + 12 + 8) + state, *[header + rows * 64 + state] * 2)
    assert run(4, count_bytes, ranks_per_node=2) == [want] * 4


# ---------------------------------------------------------------------- what goes wrong


SHAPE = MoeShape(4, 2, 16, 8)


def one_errs(rank: int, pg: None, pair: EmulatedPair) -> None:
    """A bad index stops the rank that has it before it sends anything; the others wait for its next call."""
    with pair.open(pg, SHAPE) as group:
        x, good = torch.ones(3, 16), torch.tensor([[0, 3], [1, 2], [2, -1]])
        if rank == 1:
            bad = good.clone()
            bad[2, 1] = 4
            with pytest.raises(RoutingError, match=r"topk_idx\[2, 1\] is 4.*num_experts=4"):
                group.dispatch(x, Routing(bad))
        sent = group.dispatch(x, Routing(good))
        assert group.combine(sent.x, sent.plan).x[:, 0].tolist() == [2.0, 2.0, 1.0]


@pytest.mark.usefixtures("both_paths")
def test_bad_routing(run):
    run(4, one_errs, ranks_per_node=2)


def one_errs_on_the_device(rank: int, pg: None, pair: EmulatedPair) -> None:
    """With counts on the device all ranks complete the call; the bad index counts as unused."""
    with pair.open(pg, SHAPE) as group:
        x, index = torch.ones(3, 16), torch.tensor([[0, 3], [1, 2], [2, 4 if rank == 1 else -1]])
        sent = group.dispatch(x, Routing(index), options=DispatchOptions(counts="device"))
        if rank == 1:
            with pytest.raises(RoutingError, match=r"topk_idx\[2, 1\] is 4"):
                group.synchronize()
        assert group.combine(sent.x, sent.plan).x[:, 0].tolist() == [2.0, 2.0, 1.0]


def test_bad_routing_on_the_device(run):
    run(4, one_errs_on_the_device, ranks_per_node=2)


def goes_too_far(rank: int, pg: None, pair: EmulatedPair, counts: str) -> None:
    """As on the CPU: a token for too many nodes is refused before anything is sent, if the host knows counts."""
    with pair.open(pg, replace(SHAPE, max_nodes=1)) as group:
        x, good = torch.ones(3, 16), torch.tensor([[0, 0], [1, -1], [2, 3]])
        far = good.clone()
        far[1, 1] = 3
        options = DispatchOptions(counts=counts)
        if rank == 1:
            text = r"^dispatch: topk_idx\[1\] has experts on 2 nodes, expected at most 1"
            with pytest.raises(RoutingError, match=text):  # noqa: PT012 - with counts on the device
                group.dispatch(x, Routing(far), options=options)
                group.synchronize()
        elif counts == "device":
            group.dispatch(x, Routing(good), options=options)
        sent = group.dispatch(x, Routing(good), options=options)
        assert group.combine(sent.x, sent.plan).x[:, 0].tolist() == [1.0, 1.0, 2.0]


@pytest.mark.parametrize("counts", ["host", "device"])
def test_a_token_goes_to_no_more_nodes_than_the_shape_allows(run, counts):
    run(4, goes_too_far, counts, ranks_per_node=2)


def other_options(rank: int, pg: None, pair: EmulatedPair) -> None:
    """The two nodes make different calls."""
    with pair.open(pg, SHAPE) as group:
        options = DispatchOptions(Layout.EXPERTS, alignment=4 if rank < 2 else 8)
        across = (rank + 2) % 4
        with pytest.raises(MismatchError, match=rf"rank {rank} and rank {across} made different calls: alignment"):
            group.dispatch(torch.ones(2, 16), Routing(torch.tensor([[0, 3], [1, 2]])), options=options)
        assert group._backend.broken


@pytest.mark.usefixtures("both_paths")
def test_different_calls_on_two_nodes(run):
    run(4, other_options, ranks_per_node=2)


CALLS = {
    "dispatch": lambda group, x, plan: group.dispatch(x, Routing(torch.tensor([[0, 3], [1, 2]]))),
    "dispatch on the device": lambda group, x, plan: group.dispatch(
        x, Routing(torch.tensor([[0, 3], [1, 2]])), options=DispatchOptions(counts="device")
    ),
    "redispatch": lambda group, x, plan: group.redispatch(x, plan),
    "combine": lambda group, x, plan: group.combine(torch.ones(plan.num_delivered, 16), plan),
}


def calls_of_other_kinds(rank: int, pg: None, pair: EmulatedPair, kinds: tuple[str, str]) -> str:
    """The nodes make calls of different kinds; return what a rank raises."""
    with pair.open(pg, SHAPE) as group:
        x = torch.ones(2, 16)
        plan = group.dispatch(x, Routing(torch.tensor([[0, 3], [1, 2]]))).plan
        with pytest.raises(MismatchError) as caught:  # noqa: PT012 - some raise with the next call
            CALLS[kinds[rank // 2]](group, x, plan)
            group.synchronize()
        assert group._backend.broken
        pair.barrier()
        return str(caught.value)


@pytest.mark.parametrize("other", list(CALLS)[1:])
@pytest.mark.parametrize("one", list(CALLS)[:3])
def test_calls_of_different_kinds_on_two_nodes(run, one, other):
    """Each rank names one of another node, or a rank of its own that has found one."""
    if one == other:
        return
    for rank, text in enumerate(run(4, calls_of_other_kinds, (one, other), ranks_per_node=2)):
        across, beside = (rank + 2) % 4, rank ^ 1
        found = (
            f"rank {rank} and rank {across} made different calls",
            f"rank {beside} and a rank of another node made different calls",
            f"rank {rank} waited for",
        )
        assert any(each in text for each in found), text


def rows_of_another_plan(rank: int, pg: None, pair: EmulatedPair, call: str) -> None:
    """The nodes follow different plans, with different numbers of rows between them."""
    with pair.open(pg, SHAPE) as group:
        x = torch.ones(2, 16)
        few, many = (group.dispatch(x, Routing(torch.tensor(one))).plan for one in ([[0, 3], [0, 1]], [[0, 3], [1, 2]]))
        with pytest.raises(MismatchError, match=r"use plans of the same dispatch|made different calls"):  # noqa: PT012
            CALLS[call](group, x, few if rank < 2 else many)
            group.synchronize()
        pair.barrier()


def compares_as_kernels_do(rank: int, pg: None, pair: EmulatedPair) -> None:
    """What the host would compare if an exchange did not end is right, and the same that kernels compare."""
    with pair.open(pg, SHAPE) as group:
        x, routing, rails = (
            torch.ones(2, 16),
            Routing(torch.tensor([[0, 3], [1, 2]]), torch.ones(2, 2)),
            group._backend._rails,
        )
        all_along(group, x, routing)
        plan = group.decode_dispatch(x.bfloat16(), routing).plan
        group.decode_combine(torch.ones(1, 32, 16).bfloat16(), plan)
        group.decode_combine(torch.ones(1, 32, 16).bfloat16(), plan, numerics="fast")
        group.synchronize()
        assert rails.compared == [None] * 6
        other = group.decode_dispatch(x.bfloat16(), routing).plan
        with pytest.raises(MismatchError):  # noqa: PT012 - raised with the next call
            group.decode_combine(torch.ones(1, 32, 16).bfloat16(), other if rank < 2 else plan, numerics="fast")
            group.synchronize()
        assert isinstance(rails.compared[-1], MismatchError), "as `DecodePlan`s of two dispatches"
        pair.barrier()


def test_the_host_compares_what_kernels_do(run):
    run(4, compares_as_kernels_do, ranks_per_node=2)


def is_told_of_other_calls(rank: int, pg: None, pair: EmulatedPair) -> None:
    """The exchange of rank 0 did not end, and its host has found why; nothing more is known on the device."""
    with pair.open(pg, SHAPE, timeout_s=8.0) as group:
        x, rails = torch.ones(2, 16), group._backend._rails
        plan = group.dispatch(x, Routing(torch.tensor([[0, 3], [1, 2]]))).plan
        group.synchronize()
        if rank == 0:
            rails.lost = peer_timeout(CallId(2, "combine"), 0, [2], "an exchange did not end", 1.0, "")
            rails.mismatch = MismatchError("combine #2: rank 0 and rank 2 made different calls: layout")
        with pytest.raises(MismatchError, match="made different calls: layout"):  # noqa: PT012 - some raise later
            CALLS["combine"](group, x, plan)
            group.synchronize()
        pair.barrier()


def test_what_the_host_has_found_reaches_all_ranks(run):
    run(4, is_told_of_other_calls, ranks_per_node=2)


@pytest.mark.parametrize("call", ["redispatch", "combine"])
def test_different_plans_on_two_nodes(run, call):
    run(4, rows_of_another_plan, call, ranks_per_node=2)


LOST = 3
"""A rank of node 1."""
LOSS_S = 8.0
"""A quarter of it is for ranks that begin a call late."""


def call_all(rank: int, pg: None, pair: EmulatedPair) -> None:
    """Make each call once."""
    x, routing = torch.ones(2, 16), Routing(torch.tensor([[0, 3], [1, 2]]))
    with pair.open(pg, SHAPE) as group:
        for call in CALLS.values():
            call(group, x, group.dispatch(x, routing).plan)
        group.synchronize()


def on_two_nodes(*, run: Callable[..., list[Any]]) -> None:
    run(4, call_all, ranks_per_node=2)


def one_is_silent(rank: int, pg: None, pair: EmulatedPair, call: str) -> PeerTimeout | None:
    """Rank 3 does not make a call."""
    x, routing = torch.ones(2, 16), Routing(torch.tensor([[0, 3], [1, 2]]))
    with pair.open(pg, SHAPE, timeout_s=LOSS_S) as group:
        plan = group.dispatch(x, routing).plan
        pair.barrier()
        if rank == LOST:
            pair.barrier()
            return None
        with pytest.raises(PeerTimeout) as caught:  # noqa: PT012 - with counts on the device, and in combine
            CALLS[call](group, x, plan)
            group.synchronize()
        with pytest.raises(ClosedError):
            group.redispatch(x, plan)
        pair.barrier()
        return caught.value


def silent_in_each(path: str, *, run: Callable[..., list[Any]]) -> dict[str, list[PeerTimeout | None]]:
    os.environ["TOKENFERRY_FAST_PATH"] = path  # of a process that ends with the job
    return in_each(run, call_all, one_is_silent, CALLS)


def test_a_silent_rank(pytestconfig):
    """Every survivor names it, by its number in the whole group, and its node, also if it waited for another one."""
    jobs = {path: partial(silent_in_each, path) for path in ("on", "off")}
    for path, job in in_processes(pytestconfig, on_two_nodes, jobs).items():
        for call, errors in job.result()[0].items():
            for error in errors[:LOST]:
                assert (error.peers, error.nodes) == ((LOST,), (1,)), f"{call}, fast path {path}: {error}"
                assert error.phase.split()[0] == call.split()[0], call
            assert errors[1].phase == f"{call.split()[0]} (between nodes)"


def one_ends(rank: int, pg: None, pair: EmulatedPair, call: str) -> PeerTimeout | None:
    """The process of rank 3 ends. Only rank 2, on its node, sees that."""
    with pair.open(pg, SHAPE, timeout_s=20.0) as group:
        x = torch.ones(2, 16)
        plan = group.dispatch(x, Routing(torch.tensor([[0, 3], [1, 2]]))).plan
        if rank == LOST:
            pair.barrier()
            return None
        if rank == 2:
            group._backend.context.pinned.ended[0] |= 1 << 1
        with pytest.raises(PeerTimeout) as caught:  # noqa: PT012 - with counts on the device, and in combine
            CALLS[call](group, x, plan)
            group.synchronize()
        pair.barrier()
        return caught.value


def test_the_end_of_a_process_is_noticed_on_all_nodes(run):
    """Long before the deadline, by the report of the rank that has seen it."""
    for call, errors in in_each(run, call_all, one_ends, CALLS).items():
        for error in errors[:LOST]:
            assert (error.peers, error.nodes) == ((LOST,), (1,)), f"{call}: {error}"
            assert error.waited_s < 10.0, call


def all_along(group: ExpertGroup, x: Tensor, routing: Routing) -> None:
    """Make a plan, and each call along it."""
    sent = group.dispatch(x, routing)
    group.redispatch(x, sent.plan)
    group.combine(sent.x, sent.plan)
    group.synchronize()


def gives_up_an_exchange(rank: int, pg: None, pair: EmulatedPair, which: tuple[int, bool]) -> PeerTimeout | None:
    """An exchange of rank 0 ends without having brought anything, as one of NCCL that is aborted.

    ``which``: its number, and whether it is one of a combine.
    """
    number, in_combine = which
    x, routing = torch.ones(2, 16), Routing(torch.tensor([[0, 3], [1, 2]]))
    with pair.open(pg, SHAPE, timeout_s=6.0) as group:
        rails, made = group._backend._rails, []
        plan = group.dispatch(x, routing).plan

        def exchange(call: Call, parts: Parts, kept: object, compare: object = None) -> Transfer:
            made.append(call)
            if len(made) == number:
                parts, kept = elsewhere(parts)
            return QueueRails.exchange(rails, call, parts, kept, compare)

        calls = [CALLS["redispatch"], CALLS["combine"]][: 1 + in_combine]
        with mock.patch.object(rails, "exchange", exchange if rank == 0 else rails.exchange):
            if rank > (not in_combine):
                with suppress(PeerTimeout):  # rank 0 may have sent nothing, either
                    for call in calls:
                        call(group, x, plan)
            else:
                with pytest.raises(PeerTimeout) as caught:  # noqa: PT012 - they return at once
                    for call in calls:
                        call(group, x, plan)
                    group.synchronize()
            pair.barrier()
        return caught.value if rank == 0 else None


def test_what_has_not_come_is_not_taken_for_good(run):
    """Headers with rows of a redispatch, which its node gets from it, or with sums of a combine, for itself alone."""
    for which, errors in in_each(run, call_all, gives_up_an_exchange, [(1, False), (2, True)]).items():
        assert "for rank 2: nothing came" in str(errors[0]), which


def test_a_chunk_that_has_not_come_is_not_taken_for_good(run, monkeypatch):
    """The first or the second of two chunks, of rows or of sums."""
    monkeypatch.setattr(tuning, "rail_chunks", lambda num, *_: tuple(range(num)))  # one token in each
    for which, errors in in_each(
        run, call_all, gives_up_an_exchange, [(1, False), (2, False), (3, True), (4, True)]
    ).items():
        assert "for rank 2: nothing came" in str(errors[0]), which


class StopError(Exception):
    """Ends a rank in the middle of a call."""


def stops_at(rank: int, pg: None, pair: EmulatedPair, number: int) -> PeerTimeout | None:
    """Rank 3 does not make an exchange, and nothing after it."""
    x, routing = torch.ones(2, 16), Routing(torch.tensor([[0, 3], [1, 2]]))
    with pair.open(pg, SHAPE, timeout_s=LOSS_S) as group:
        rails, made = group._backend._rails, []

        def exchange(*args: Any) -> Transfer:
            made.append(args)
            if len(made) == number:
                raise StopError
            return QueueRails.exchange(rails, *args)

        def calls() -> None:
            all_along(group, x, routing)
            group.dispatch(x, routing)  # a rank that has all that it needs notices in the next call

        with mock.patch.object(rails, "exchange", exchange if rank == LOST else rails.exchange):
            with pytest.raises(StopError if rank == LOST else PeerTimeout) as caught:
                calls()
            pair.barrier()
        return None if rank == LOST else caught.value


@pytest.mark.parametrize(("numbers", "at_once"), [(range(1, 5), True), ((2, 3), False)])
def test_a_rank_is_lost_in_the_middle_of_a_call(run, monkeypatch, numbers, at_once):
    """Before any exchange of a dispatch (headers with routing, rows), a redispatch or a combine (headers with rows).

    A dispatch whose routing is large: headers, routing, rows.
    """
    if not at_once:
        monkeypatch.setattr(tuning, "ROUTING_AT_ONCE_BYTES", 0)
    for number, errors in in_each(run, call_all, stops_at, numbers).items():
        for error in errors[:LOST]:
            assert (error.peers, error.nodes) == ((LOST,), (1,)), f"exchange {number}: {error}"
