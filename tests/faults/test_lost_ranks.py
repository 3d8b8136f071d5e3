"""A rank that dies, stalls or makes another call: which errors its peers raise, and how they go on.

Rank 2 of three is lost in one phase. Only the deadlines under test depend on a clock: a stalled rank waits until the
others have reported what they saw.

On GPUs a call may return before the device has found anything, so the ranks here wait for their calls
(`ExpertGroup.synchronize`, which has nothing to do on the CPU).
"""

import os
import signal
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pytest
import torch

from support.decoding import Step, check_combined, check_received
from support.lost_ranks import (
    CASE,
    CROWDED_S,
    LONG_S,
    LOST_RANK,
    PHASES,
    SHORT_S,
    Loss,
    Report,
    barrier,
    calls,
    check_both_late,
    check_report,
    expect_timeout,
    leave_note,
    report_of,
    sleep_in,
    wait_for_others,
)
from support.mismatches import MISMATCHES, check_mismatch, disagree
from support.pairs import CPU_PAIRS, CUDA_PAIRS, PAIRS, Pair
from support.slow_ranks import SLOW_S, dropped_before_the_peer_receives, masked_behind_a_slow_one, one_gone_one_slow
from support.worlds import run_at_once
from tokenferry import (
    BackendUnavailable,
    ClosedError,
    ExpertGroup,
    PeerTimeout,
    Routing,
    TokenferryError,
)
from tokenferry.testing.cases import Case
from tokenferry.testing.world import World, WorldError


def die_in(rank, pg, pair: Pair, phase: str, how: str, folder: str) -> Report:
    barrier(pg)
    with pair.open(pg, CASE.shape, timeout_s=LONG_S) as group:
        todo = calls(group, rank)
        if rank != LOST_RANK:
            leave_note(folder, rank, "is ready")
            return expect_timeout(todo, phase, group)
        wait_for_others(folder, "is ready")  # or they may still be reading what this rank sent before
        if how == "exit":
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("this rank was killed")


@pytest.mark.parametrize(("phase", "how"), [(phase, ("exit", "kill")[i % 2]) for i, phase in enumerate(PHASES)])
def test_a_rank_that_dies(pair, phase, how, tmp_path):
    with World(3, devices=pair.backend) as world, pytest.raises(WorldError) as caught:
        world.run(die_in, pair, phase, how, str(tmp_path))
    assert set(caught.value.errors) == {LOST_RANK}, caught.value
    assert isinstance(caught.value.errors[LOST_RANK], ChildProcessError)
    for rank, report in caught.value.results.items():
        check_report(report, rank, phase)
        assert report.took_s < LONG_S, "a dead rank is seen at once"
        assert pair.backend == "cpu" or "its process ended" in report.text


SLEEPY_PHASES = ("dispatch", "combine", *PHASES[3:])


@pytest.fixture(scope="module", params=PAIRS, ids=str)
def reports_of_sleep(request, tmp_path_factory) -> dict[str, Future[list[Report]]]:
    """By phase, what ranks 0 and 1 report when rank 2 sleeps in it; all phases wait at the same time."""

    def job(phase: str) -> partial:
        return partial(sleep_in, pair=request.param, loss=Loss(phase, str(tmp_path_factory.mktemp("sleep")), CROWDED_S))

    return run_at_once(3, request.param.backend, {phase: job(phase) for phase in SLEEPY_PHASES})


@pytest.mark.parametrize("phase", SLEEPY_PHASES)
def test_a_rank_that_sleeps(reports_of_sleep, phase):
    check_both_late(reports_of_sleep[phase].result(), phase, CROWDED_S)


def test_a_rank_that_is_stopped(pair, tmp_path):
    """As under a debugger: its sockets stay open, and it sends nothing."""
    with World(3, devices=pair.backend) as world:
        world.submit(sleep_in, pair, Loss("dispatch", str(tmp_path)))
        deadline = time.monotonic() + 60.0
        while not Path(tmp_path, f"{LOST_RANK} is asleep").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(world.pids[LOST_RANK], signal.SIGSTOP)
        try:
            while len(list(tmp_path.glob("* has reported"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            os.kill(world.pids[LOST_RANK], signal.SIGCONT)
        results = world.collect()
    check_both_late(results, "dispatch")


def come_late_to_the_group(rank, pg, pair: Pair, folder: str) -> Report | None:
    barrier(pg)
    if rank == LOST_RANK:
        wait_for_others(folder)
        with pytest.raises(TokenferryError):
            pair.open(pg, CASE.shape, timeout_s=SHORT_S)
        return None
    with pytest.raises(PeerTimeout) as caught:
        pair.open(pg, CASE.shape, timeout_s=SHORT_S)
    leave_note(folder, rank, "has reported")
    return report_of(caught.value)


def test_a_rank_that_does_not_come(pair, tmp_path):
    with World(3, devices=pair.backend) as world:
        results = world.run(come_late_to_the_group, pair, str(tmp_path))
    for rank in (0, 1):
        report = results[rank]
        assert (report.phase, report.call, report.rank) == ("making the group", 0, rank)
        assert LOST_RANK in report.peers
        assert report.waited_s < SHORT_S + 10.0


def die_before_the_group(rank, pg, pair: Pair) -> Report:
    if rank == LOST_RANK:
        os._exit(1)
    with pytest.raises(PeerTimeout) as caught:
        pair.open(pg, CASE.shape, timeout_s=LONG_S)
    return report_of(caught.value)


def test_a_rank_that_dies_before_it_comes(pair):
    with World(3, devices=pair.backend) as world, pytest.raises(WorldError) as caught:
        world.run(die_before_the_group, pair)
    assert set(caught.value.errors) == {LOST_RANK}, caught.value
    for rank, report in caught.value.results.items():
        assert (report.phase, report.call, report.rank) == ("making the group", 0, rank)
        assert report.waited_s < LONG_S


def go_on_without(rank, pg, pair: Pair, folder: str) -> None:
    """With on_timeout="mask", decode calls go on without rank 2; the others still raise."""
    barrier(pg)
    step = Step(CASE, rank, frozenset({LOST_RANK}))
    with pair.open(pg, CASE.shape, timeout_s=SHORT_S, on_timeout="mask") as group:
        unmasked = Step(CASE, rank)
        sent = group.decode_dispatch(unmasked.mine().x, unmasked.routing())
        check_received(unmasked, sent, None)
        if rank == LOST_RANK:
            wait_for_others(folder)
            return
        late = group.decode_dispatch(step.mine().x, step.routing(), return_hook=rank == 1)
        late.hook()
        assert group.masked_ranks == {LOST_RANK}
        start = time.monotonic()
        for _ in range(3):
            sent = group.decode_dispatch(step.mine().x, step.routing())
            check_received(step, sent, None)
            check_combined(group, step, sent, torch.bfloat16)
            check_combined(group, step, sent, torch.float32, fast=True, hook=True)
        assert time.monotonic() - start < SHORT_S * 9, "a masked rank was waited for again"
        with pytest.raises(PeerTimeout):
            group.dispatch(step.mine().x, step.routing())
        leave_note(folder, rank, "has reported")


def test_decoding_goes_on_without_a_silent_rank(tmp_path):
    with World(3) as world:
        world.run(go_on_without, CPU_PAIRS[0], str(tmp_path))


def mask_over_torch_distributed(rank, pg) -> None:
    with pytest.raises(
        BackendUnavailable, match=r"on_timeout='mask' needs the transport 'shared_memory'.* use on_timeout='raise'"
    ):
        ExpertGroup(pg, CASE.shape, backend="cpu", transport="process_group", on_timeout="mask")
    with ExpertGroup(pg, CASE.shape, transport="auto", on_timeout="mask") as group:
        assert group.backend == "cpu"
        assert group.transport == "shared_memory"


def test_masking_on_timeout_needs_shared_memory(worlds):
    worlds(3).run(mask_over_torch_distributed)


def close_alone(rank, pg, pair: Pair) -> None:
    """Rank 0 closes without a word to rank 1, which finds out by its next call; results stay."""
    barrier(pg)
    case = Case((3, 4), 4, 2, dtype=torch.float32)
    group = pair.open(pg, case.shape, timeout_s=LONG_S if pair.transport == "shared_memory" else SHORT_S)
    group.warmup()
    view = group.for_shape(case.shape)
    mine = case.inputs()[rank]
    routing = Routing(mine.topk_idx, mine.topk_weights)
    sent = group.dispatch(mine.x, routing)
    out = group.combine(sent.x, sent.plan)
    kept = sent.x.clone(), out.x.clone()
    if rank == 1:
        with pytest.raises(PeerTimeout, match=r"rank 1 waited .* for rank 0"):
            group.dispatch(mine.x, routing)
    group.close()
    group.close()
    view.close()
    for call in (
        lambda: view.dispatch(mine.x, routing),
        lambda: group.for_shape(case.shape),
        lambda: group.mask(1 - rank),
    ):
        with pytest.raises(ClosedError, match="make a new ExpertGroup"):
            call()
    assert torch.equal(sent.x, kept[0])
    assert torch.equal(out.x, kept[1])


def test_closing_is_local_and_idempotent(pair):
    with World(2, devices=pair.backend) as world:
        world.run(close_alone, pair)


def close_with_a_hook_pending(rank, pg, pair: Pair) -> None:
    case = Case((3, 4), 4, 2, dtype=torch.float32)
    mine = case.inputs()[rank]
    with pair.open(pg, case.shape, timeout_s=LONG_S) as group:
        got = group.decode_dispatch(mine.x, Routing(mine.topk_idx), return_hook=True)
    with pytest.raises(ClosedError, match="closed"):
        got.hook()


def test_a_hook_of_a_closed_group_says_so():
    with World(2) as world:
        world.run(close_with_a_hook_pending, CPU_PAIRS[0])


@pytest.mark.parametrize("name", MISMATCHES)
@pytest.mark.parametrize("pair", [CPU_PAIRS[0], *CUDA_PAIRS], ids=str)
def test_ranks_that_call_different_things(worlds, pair, name):
    for rank, text in enumerate(worlds(3, pair.backend).run(disagree, pair, name)):
        check_mismatch(text, rank, 3, name)


def test_ranks_that_call_different_things_over_torch_distributed():
    with World(3) as world:
        for rank, text in enumerate(world.run(disagree, CPU_PAIRS[1], "another dtype")):
            check_mismatch(text, rank, 3, "another dtype")


# ---------------------------------------------------------------------- one is gone, another is slow


@pytest.mark.parametrize("pair", CPU_PAIRS, ids=str)
def test_a_rank_that_is_gone_is_named_while_another_is_slow(pair, tmp_path):
    """Messages are received in the order of ranks; what ends a call is said at once all the same."""
    with World(3) as world, pytest.raises(WorldError) as caught:
        world.run(one_gone_one_slow, pair, str(tmp_path))
    report = caught.value.results[2]
    assert report.peers == (1,)
    assert report.took_s < SLOW_S


def test_rows_of_a_slow_rank_come_though_another_is_masked_first():
    with World(3) as world, pytest.raises(WorldError) as caught:
        world.run(masked_behind_a_slow_one, CPU_PAIRS[0])
    assert CPU_PAIRS[0].transport == "shared_memory"
    for rank, first in ((0, [1.0, 1.0, 3.0, 3.0]), (2, [1.0, 1.0, 3.0, 3.0])):
        assert caught.value.results[rank] == (first, [1])


@pytest.mark.parametrize("pair", CPU_PAIRS, ids=str)
def test_what_a_dropped_group_has_sent_arrives(worlds, pair):
    for rows in worlds(2).run(dropped_before_the_peer_receives, pair):
        assert rows == [1.0, 1.0, 2.0, 2.0]
