"""Decode calls of the CUDA backend across nodes, on the emulator."""

import copy
import pickle
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from support import decode_jobs, deep_ep_decode_jobs
from support.ambient import STATES
from support.decoding import Step, check_combined, check_received
from support.emulated_group import EmulatedPair, Puts, in_each, in_processes
from support.emulated_rails import QueueRails, QueueTransfer, elsewhere
from support.emulator import Emulator
from support.fake_network import Weather
from support.throughput import check_round_trip
from tokenferry import (
    ArgumentError,
    CapacityError,
    ClosedError,
    DispatchOptions,
    ExpertGroup,
    MismatchError,
    MoeShape,
    PeerTimeout,
    Routing,
    RoutingError,
    Scale,
    UnsupportedError,
)
from tokenferry.backends.cuda.across.rails import Parts, Transfer
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.kernels.control_block import TRACE
from tokenferry.kernels.decode_dispatch import spec as decode_dispatch_spec
from tokenferry.memory.streams import HostStreams
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import same_bits

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))

NODES = [(4, 2), (6, 2), (3, 1)]
"""Ranks, and ranks of a node."""
SHAPE = MoeShape(4, 2, 16, 8)
INPUTS = (
    torch.ones(2, 16, device="cpu"),
    Routing(torch.tensor([[0, 3], [1, 2]], device="cpu"), torch.ones(2, 2, device="cpu")),
)
"""Rows and routing of each rank: each token goes to both of two nodes."""


WAYS = ("exchanged", "put")


def by_way(run: Callable[..., list[Any]], way: str) -> Callable[..., list[Any]]:
    """``run``, with messages that are exchanged, or that are put: by the network on one rail of two."""
    puts = Puts(Weather(0.002, reorder=True), mapped=lambda rank: rank % 2 == 1)
    return run if way == "exchanged" else partial(run, puts=puts)


@pytest.fixture(params=WAYS)
def run_both(request, run):
    """``run`` for each of them."""
    return by_way(run, request.param)


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize(("ranks", "per_node"), NODES)
def test_rounds(run, ranks, per_node):
    run(ranks, decode_jobs.rounds, ranks, ranks_per_node=per_node)


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize(("ranks", "per_node"), NODES)
def test_encodings(run, ranks, per_node):
    run(ranks, decode_jobs.encodings, ranks, ranks_per_node=per_node)


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize(("ranks", "job"), [(2, decode_jobs.not_finite), (3, decode_jobs.plans_in_other_views)])
def test_the_rest_of_the_decode_calls(run, ranks, job):
    run(ranks, job, ranks_per_node=1)


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize(("ranks", "per_node"), NODES[:1])
def test_hooks_may_be_called_in_any_order_and_twice(run, ranks, per_node):
    run(ranks, decode_jobs.hooks_in_any_order, ranks, ranks_per_node=per_node)


def test_ranks_need_not_agree_on_hooks(run_both):
    run_both(4, decode_jobs.hooks_of_some_ranks, 4, ranks_per_node=2)


# ---------------------------------------------------------------------- hooks


def hooks_between_calls(rank: int, pg: None, pair: EmulatedPair) -> None:
    """Ranks receive a call in its hook, behind the next call, or never; each rank does what its peers wait for."""
    case = Case((3, 2, 4, 1), 8, 3, hidden=64, dtype=torch.float32)
    step = Step(case, rank)
    with pair.open(pg, case.shape) as group:
        for turn in range(4):
            late = turn % 4 == rank
            sent = group.decode_dispatch(step.mine().x, step.routing(), return_hook=True)
            if not late:
                sent.hook()
                check_received(step, sent, None)
            check_round_trip(group, case, DispatchOptions())
            sent.hook()
            check_received(step, sent, None)
            home = group.decode_combine(sent.x, sent.plan, return_hook=True, numerics="fast" if turn % 2 else "exact")
            if not late:
                home.hook()
            again = group.decode_dispatch(step.mine().x, step.routing())
            check_received(step, again, None)
            home.hook()
            numerics = "fast" if turn % 2 else "exact"
            assert torch.equal(home.x, group.decode_combine(again.x, again.plan, numerics=numerics).x)
        sent = group.decode_dispatch(step.mine().x, step.routing(), return_hook=True)
        group.warmup()
        check_received(step, sent, None)
        group.decode_dispatch(step.mine().x, step.routing(), return_hook=True)  # nobody calls its hook


@pytest.mark.usefixtures("both_paths")
def test_a_hook_waits_for_no_hook_of_a_peer_that_makes_calls(run_both):
    run_both(4, hooks_between_calls, ranks_per_node=2)


# ---------------------------------------------------------------------- slots


def overflow(rank: int, pg: None, pair: EmulatedPair, hook: bool) -> str:
    """Rank 2 has three tokens for node 0, which may get two of each rank; then it sends fewer."""
    case = Case((2, 1, 3, 0), 8, 2, hidden=64, dtype=torch.float32)
    mine, weights = case.inputs()[rank], torch.ones(case.tokens[rank], 2)
    to_node_0 = torch.tensor([[0, 2]]).repeat(len(mine.x), 1)
    with pair.open(pg, replace(case.shape, node_slots=2)) as group:
        texts = []
        for _ in range(2):
            sent = group.decode_dispatch(mine.x, Routing(to_node_0, weights), return_hook=hook)
            sent.hook()
            with pytest.raises(CapacityError) as caught:
                group.synchronize()
            texts.append(str(caught.value))
            assert group.decode_combine(sent.x, sent.plan).x[: 3 * (rank == 2)].eq(0.0).all()
        to_node_0[2:] = -1
        sent = group.decode_dispatch(mine.x, Routing(to_node_0, weights), return_hook=hook)
        sent.hook()
        home = group.decode_combine(sent.x, sent.plan).x
        assert torch.equal(home[:2], mine.x[:2] * 2), "the group is usable"
        check_round_trip(group, case, DispatchOptions())
    assert texts[0] == texts[1]
    return texts[0]


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize(("ranks", "per_node"), [(4, 2), (4, 1)])
def test_every_rank_is_told_of_an_overflow(run_both, ranks, per_node, hook):
    assert set(run_both(ranks, overflow, hook, ranks_per_node=per_node)) == {
        "decode_dispatch: rank 2 has 3 tokens for one other node, more than node_slots=2; send fewer at once, or make "
        "the group with MoeShape(node_slots=3)"
    }


def few_slots(rank: int, pg: None, pair: EmulatedPair) -> None:
    """Slots for fewer tokens than there are, and for all that cross."""
    case = Case((20, 17, 9, 12), 8, 2, hidden=64, dtype=torch.float32)
    step = Step(case, rank)
    most = max(int(((one.topk_idx // 4 == 1 - i // 2).any(1)).sum()) for i, one in enumerate(case.inputs()))
    assert most < 20
    with pair.open(pg, replace(case.shape, node_slots=most)) as group:
        sent = group.decode_dispatch(step.mine().x, step.routing())
        check_received(step, sent, None)
        for fast in (False, True):
            check_combined(group, step, sent, torch.float32, fast=fast)
        group.synchronize()


@pytest.mark.usefixtures("both_paths")
def test_fewer_slots_than_tokens(run_both):
    run_both(4, few_slots, ranks_per_node=2)


# ---------------------------------------------------------------------- the DeepEP API


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize(("ranks", "per_node"), [(4, 2), (2, 1)])
def test_low_latency_calls(buffers, ranks, per_node):
    case = Case((5, 3, 0, 7)[:ranks], experts=2 * ranks, top_k=3, hidden=256)
    buffers(ranks, deep_ep_decode_jobs.round_trip, case, False, ranks_per_node=per_node)


@pytest.mark.usefixtures("both_paths")
def test_low_latency_calls_in_fp8_and_logfmt(buffers):
    buffers(4, deep_ep_decode_jobs.fp8, deep_ep_decode_jobs.CASES[1], True, True, ranks_per_node=2)
    buffers(4, deep_ep_decode_jobs.logfmt, deep_ep_decode_jobs.CASES[0], False, ranks_per_node=2)


# ---------------------------------------------------------------------- what crosses


def count_bytes(rank: int, pg: None, pair: EmulatedPair) -> list[int]:
    """Return the bytes that a rank sends to the other node in a dispatch, an exact combine and a fast one."""
    with pair.open(pg, replace(SHAPE, hidden=512, node_slots=3)) as group:
        rails, x, counted = group._backend._rails, torch.ones(2, 512, dtype=torch.bfloat16), []
        routing = Routing(INPUTS[1].topk_idx, torch.ones(2, 2))

        def count() -> None:
            counted.append(rails.num_bytes - sum(counted))

        group.decode_dispatch(x, routing, quantize=Scale.FLOAT32)  # nodes agree about the memory that it makes
        count()
        sent = group.decode_dispatch(x, routing, quantize=Scale.FLOAT32)
        count()
        y = torch.ones(*sent.x.data.shape, dtype=torch.bfloat16)
        for numerics, encoding in (("exact", "same"), ("fast", "same"), ("fast", "fp8")):
            group.decode_combine(y, sent.plan, numerics=numerics, encoding=encoding)
            count()
        return counted


def test_as_much_crosses_as_there_are_slots(run):
    """Eight for three tokens: segments are multiples of eight. Records: a row, its scales, a token, ids, weights."""
    slots, header, state = 8, 68, 8
    dispatch = header + slots * (512 + 16 + 16) + state
    sums = header + state + slots * 2 * 512
    fp8 = header + state + slots * 33 * 16
    expected = [header + dispatch, dispatch, sums + slots * 2 * 4, sums, fp8]
    assert run(4, count_bytes, ranks_per_node=2) == [expected] * 4


# ---------------------------------------------------------------------- counters


@pytest.mark.usefixtures("both_paths")
def test_counters_are_added_to(run):
    """A rank waits for those of its node, and for its rail peers; ranks that pass on may wait for others."""
    before = decode_jobs.BEFORE
    counted = run(4, decode_jobs.counters, 4, ranks_per_node=2)
    for rank, (dispatch, combine) in enumerate(counted):
        assert (dispatch[rank], combine[rank]) == (before, 0), "a rank waited for itself"
        for late in [0] if rank in (1, 2) else [2] if rank == 3 else []:
            assert before < dispatch[late] < before + 60e9
            assert 0 < combine[late] < 60e9
    dispatch, combine = counted[3]
    assert (dispatch[0], combine[0]) == (before, 0), "neither in its node nor its rail peer"


# ---------------------------------------------------------------------- CUDA graphs


CAPTURE = threading.local()
"""``CAPTURE.on``: whether a thread captures a CUDA graph; ``CAPTURE.first``: whether calls make memory."""


def captured(rank: int, pg: None, pair: EmulatedPair) -> None:
    """A capture does not receive what belongs outside of it; and the host waits for nothing."""
    CAPTURE.on, CAPTURE.first = False, True
    with pair.open(pg, SHAPE) as group:
        y = torch.ones(2, 16, 16)
        group.decode_combine(y, group.decode_dispatch(*INPUTS).plan)
        CAPTURE.first = False  # nodes have agreed about memory
        pending = group.decode_dispatch(*INPUTS, return_hook=True)
        CAPTURE.on = True
        with pytest.raises(ArgumentError, match="the hook of an earlier decode_dispatch has to be called before"):
            group.dispatch(*INPUTS)
        CAPTURE.on = False
        pending.hook()
        CAPTURE.on = True
        plan = group.decode_dispatch(*INPUTS).plan
        for numerics in ("exact", "fast"):
            sent = group.decode_combine(y, plan, numerics=numerics, return_hook=True)
            sent.hook()
        CAPTURE.on = False


def capture_of(streams: HostStreams, stream: int) -> int:
    return 7 if getattr(CAPTURE, "on", False) else 0


def eager_stream(streams: HostStreams) -> int | None:
    return None if getattr(CAPTURE, "on", False) else 0


@pytest.mark.usefixtures("both_paths")
def test_calls_that_a_graph_captures(run_both):
    wait = QueueTransfer.wait

    def wait_at_first(transfer: QueueTransfer) -> None:
        assert CAPTURE.first, "the host waits"
        wait(transfer)

    with (
        mock.patch.object(HostStreams, "capture", capture_of),
        mock.patch.object(HostStreams, "eager", eager_stream),
        mock.patch.object(Context, "wait_for_words", side_effect=AssertionError("the host waits")),
        mock.patch.object(QueueTransfer, "wait", wait_at_first),
    ):
        run_both(2, captured, ranks_per_node=1)


def many_replays(rank: int, pg: None, pair: EmulatedPair) -> None:
    """Both halves of all buffers are used again and again, with and without hooks, by any number of tokens."""
    shape = MoeShape(8, 3, 64, 16, node_slots=16)
    with pair.open(pg, shape) as group:
        for seed in range(6):
            case = Case((16, 3 * seed, 0, 9), 8, 3, hidden=64, dtype=torch.float32, seed=seed, routing="half_dropped")
            step = Step(case, rank)
            view = group.for_shape(case.shape)
            sent = view.decode_dispatch(step.mine().x, step.routing(), return_hook=seed % 2 == 0)
            sent.hook()
            check_received(step, sent, None)
            check_combined(view, step, sent, torch.float32, fast=seed % 3 == 0, hook=seed % 2 == 1)


@pytest.mark.usefixtures("both_paths")
def test_buffers_are_used_again(run_both):
    run_both(4, many_replays, ranks_per_node=2)


# ---------------------------------------------------------------------- plans


def use_copies(rank: int, pg: None, pair: EmulatedPair) -> None:
    """What a plan knows about other nodes survives copies, and weights may come later."""
    case = Case((6, 0, 9, 3), 8, 3, dtype=torch.float32, routing="half_dropped")
    step = Step(case, rank)
    with pair.open(pg, case.shape) as group:
        sent = group.decode_dispatch(step.mine().x, step.routing())
        for plan in (copy.copy(sent.plan), pickle.loads(pickle.dumps(sent.plan))):
            check_combined(group, step, replace(sent, plan=plan), torch.float32)
        sent = group.decode_dispatch(step.mine().x, Routing(step.mine().topk_idx))
        later = replace(sent, plan=replace(sent.plan, topk_weights=step.mine().topk_weights))
        check_combined(group, step, later, torch.float32)


@pytest.mark.usefixtures("both_paths")
def test_copies_of_plans(run_both):
    run_both(4, use_copies, ranks_per_node=2)


@pytest.mark.parametrize(("ranks", "per_node"), NODES[::2])
def test_large_routings(run, monkeypatch, ranks, per_node):
    """Choices that no block prepares for itself."""
    monkeypatch.setattr(decode_dispatch_spec, "CHOICES_BYTES", 16)
    run(ranks, decode_jobs.rounds, ranks, ranks_per_node=per_node)


# ---------------------------------------------------------------------- settings of torch, time stamps


def in_a_state(rank: int, pg: None, pair: EmulatedPair, name: str | None) -> list[torch.Tensor]:
    """Return what calls give while a thread has a state of torch; ``name``: which one, or None."""
    found = []
    with STATES[name].of_a_thread("cpu") if name else nullcontext(), pair.open(pg, SHAPE) as group:
        x = torch.arange(32, dtype=torch.float32, device="cpu").view(2, 16) + 100 * rank
        for hook in (False, True):
            sent = group.decode_dispatch(x, INPUTS[1], return_hook=hook)
            sent.hook()
            y = torch.zeros_like(sent.x)
            y[:, : int(sent.expert_counts)] = sent.x[:, : int(sent.expert_counts)]
            for numerics in ("exact", "fast"):
                home = group.decode_combine(y, sent.plan, numerics=numerics, return_hook=hook)
                home.hook()
                found.append(home.x)
    return [tensor.clone() for tensor in found]


@pytest.mark.parametrize("name", STATES)
def test_the_state_of_torch_has_no_say(run, name):
    plain = run(4, in_a_state, None, ranks_per_node=2)
    with STATES[name].of_the_process():
        found = run(4, in_a_state, name, ranks_per_node=2)
    for got, want in zip(found, plain, strict=True):
        for one, other in zip(got, want, strict=True):
            same_bits(name, one, other)


def timed(rank: int, pg: None, pair: EmulatedPair) -> None:
    """The time stamps of a call with a hook lie where they were wanted when it was made."""
    with pair.open(pg, SHAPE) as group:
        backend = group._backend
        plan = group.decode_dispatch(*INPUTS).plan
        for call in ("decode_dispatch", "decode_combine"):
            first, second = backend.new_traces(2)
            backend.set_trace(first)
            y = torch.ones(1, 32, 16)
            sent = (
                group.decode_dispatch(*INPUTS, return_hook=True)
                if call == "decode_dispatch"
                else group.decode_combine(y, plan, return_hook=True)
            )
            backend.set_trace(second)
            sent.hook()
            assert first[:-1, TRACE["end"]].all(), "every block with rows has ended"
            assert not second.any()
            backend.set_trace(None)


def test_time_stamps(run_both):
    run_both(4, timed, ranks_per_node=2)


# ---------------------------------------------------------------------- what goes wrong


def one_errs(rank: int, pg: None, pair: EmulatedPair) -> None:
    """All ranks complete the call: the bad index counts as unused; a token for too many nodes goes to all of them."""
    for shape, wrong, text in (
        (SHAPE, 4, r"decode_dispatch: topk_idx\[1, 1\] is 4, expected an expert in \[0, 4\)"),
        (replace(SHAPE, max_nodes=1), 3, r"decode_dispatch: topk_idx\[1\] has experts on 2 nodes, expected at most 1"),
    ):
        with pair.open(pg, shape) as group:
            index = torch.tensor([[0, 0], [1, wrong if rank == 1 else 1]])
            sent = group.decode_dispatch(torch.ones(2, 16), Routing(index, torch.ones(2, 2)))
            if rank == 1:
                with pytest.raises(RoutingError, match=text):
                    group.synchronize()
            home = group.decode_combine(sent.x, sent.plan).x
            assert home[:, 0].tolist() == [2.0, 1.0 if rank == 1 and wrong == 4 else 2.0]
            group.synchronize()


def test_bad_routing(run_both):
    run_both(4, one_errs, ranks_per_node=2)


def lone_mask(rank: int, pg: None, pair: EmulatedPair) -> None:
    with pair.open(pg, SHAPE) as group:
        with pytest.raises(
            UnsupportedError, match="skip ranks across nodes with transport='nvshmem', and not over NCCL"
        ):
            group.mask(1 - rank)
        assert group._backend.broken is None


def test_there_are_no_masks(run):
    run(2, lone_mask, ranks_per_node=1)


CALLS = {
    "decode_dispatch": lambda group, plan: group.decode_dispatch(*INPUTS),
    "exact decode_combine": lambda group, plan: group.decode_combine(torch.ones(1, 32, 16), plan),
    "fast decode_combine": lambda group, plan: group.decode_combine(torch.ones(1, 32, 16), plan, numerics="fast"),
    "dispatch": lambda group, plan: group.dispatch(*INPUTS),
    "hooks": lambda group, plan: group.decode_dispatch(*INPUTS, return_hook=True).hook(),
}


def calls_of_other_kinds(rank: int, pg: None, pair: EmulatedPair, kinds: tuple[str, str]) -> str:
    """The nodes make calls of different kinds; return what a rank raises."""
    with pair.open(pg, SHAPE, timeout_s=10.0) as group:
        plan = group.decode_dispatch(*INPUTS).plan
        with pytest.raises(MismatchError) as caught:  # noqa: PT012 - some raise with the next call
            CALLS[kinds[rank // 2]](group, plan)
            group.synchronize()
        assert group._backend.broken
        pair.barrier()
        return str(caught.value)


def first_calls_of_other_kinds(rank: int, pg: None, pair: EmulatedPair) -> str:
    """One node makes its first decode call, about whose memory nodes agree; return what a rank raises."""
    with pair.open(pg, SHAPE, timeout_s=10.0) as group:
        with pytest.raises(MismatchError) as caught:  # noqa: PT012 - some raise with the next call
            CALLS[("decode_dispatch", "dispatch")[rank // 2]](group, None)
            group.synchronize()
        assert group._backend.broken
        pair.barrier()
        return str(caught.value)


def test_a_first_decode_call_meets_another_call(run_both):
    for text in run_both(4, first_calls_of_other_kinds, ranks_per_node=2):
        assert "different calls" in text


@pytest.mark.parametrize(
    "kinds", [("decode_dispatch", "fast decode_combine"), ("exact decode_combine", "dispatch"), ("hooks", "dispatch")]
)
def test_calls_of_different_kinds_on_two_nodes(run_both, kinds):
    for text in run_both(4, calls_of_other_kinds, kinds, ranks_per_node=2):
        assert "different calls" in text


LOST = 3
"""A rank of node 1."""


def call_all(rank: int, pg: None, pair: EmulatedPair) -> None:
    """Make each call once."""
    with pair.open(pg, SHAPE) as group:
        for call in CALLS.values():
            call(group, group.decode_dispatch(*INPUTS).plan)
        group.synchronize()


def one_is_silent(rank: int, pg: None, pair: EmulatedPair, call: str) -> PeerTimeout | None:
    """Rank 3 does not make a call."""
    with pair.open(pg, SHAPE, timeout_s=8.0) as group:  # of which a quarter is for ranks that begin late
        plan = group.decode_dispatch(*INPUTS).plan
        pair.barrier()
        if rank == LOST:
            pair.barrier()
            return None
        with pytest.raises(PeerTimeout) as caught:  # noqa: PT012 - some raise with the next call
            CALLS[call](group, plan)
            group.synchronize()
        with pytest.raises(ClosedError):
            group.decode_dispatch(*INPUTS)
        pair.barrier()
        return caught.value


def call_all_ways(*, run: Callable[..., list[Any]]) -> None:
    for way in WAYS:
        by_way(run, way)(4, call_all, ranks_per_node=2)


def silent_in_each(way: str, *, run: Callable[..., list[Any]]) -> dict[str, list[PeerTimeout | None]]:
    return in_each(by_way(run, way), call_all, one_is_silent, [call for call in CALLS if call != "dispatch"])


def test_a_silent_rank(pytestconfig):
    jobs = {way: partial(silent_in_each, way) for way in WAYS}
    for way, job in in_processes(pytestconfig, call_all_ways, jobs).items():
        for call, errors in job.result()[0].items():
            for error in errors[:LOST]:
                assert (error.peers, error.nodes) == ((LOST,), (1,)), f"{call}, {way}: {error}"


def gives_up_an_exchange(rank: int, pg: None, pair: EmulatedPair, number: int) -> str | None:
    """An exchange of rank 0 ends without having brought anything, as one of NCCL that is aborted."""

    def calls(group: ExpertGroup) -> None:
        plan = group.decode_dispatch(*INPUTS).plan
        group.decode_combine(torch.ones(1, 32, 16), plan)
        group.decode_combine(torch.ones(1, 32, 16), plan, numerics="fast")
        group.synchronize()

    with pair.open(pg, SHAPE, timeout_s=6.0) as group:
        rails, made = group._backend._rails, []
        group.decode_dispatch(*INPUTS)

        def exchange(call: Call, parts: Parts, kept: object, compare: object = None) -> Transfer:
            made.append(call)
            if len(made) == number:
                parts, kept = elsewhere(parts)
            return QueueRails.exchange(rails, call, parts, kept, compare)

        with mock.patch.object(rails, "exchange", exchange if rank == 0 else rails.exchange):
            with suppress(PeerTimeout) if rank else pytest.raises(PeerTimeout) as caught:
                calls(group)
            pair.barrier()
        return str(caught.value) if rank == 0 else None


def test_what_has_not_come_is_not_taken_for_good(run):
    """Rows; weights and sums of an exact combine; sums of a fast one."""
    for number, texts in in_each(run, call_all, gives_up_an_exchange, (1, 2, 3, 4)).items():
        assert "for rank 2: nothing came" in texts[0], number


def other_dispatches(rank: int, pg: None, pair: EmulatedPair, numerics: str) -> str:
    """The nodes combine along plans of different dispatches; return what a rank raises."""
    with pair.open(pg, SHAPE) as group:
        plans = [group.decode_dispatch(*INPUTS).plan for _ in range(2)]
        with pytest.raises(MismatchError) as caught:  # noqa: PT012 - some raise with the next call
            group.decode_combine(torch.ones(1, 32, 16), plans[rank // 2], numerics=numerics)
            group.synchronize()
        pair.barrier()
        return str(caught.value)


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_plans_of_different_dispatches_on_two_nodes(run_both, numerics):
    texts = run_both(4, other_dispatches, numerics, ranks_per_node=2)
    assert all("made different calls" in text for text in texts)
    assert any("combines the rows of dispatch" in text for text in texts), "the others may learn of it from a rank"
