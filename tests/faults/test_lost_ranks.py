"""A rank that dies, stalls or makes another call: which errors its peers raise, and how they go on.

Rank 2 of three is lost in one phase. Only the deadlines under test depend on a clock: a stalled rank waits until the
others have reported what they saw.

On GPUs a call may return before the device has found anything, so the ranks here wait for their calls
(`ExpertGroup.synchronize`, which has nothing to do on the CPU).
"""

import os
import signal
from concurrent.futures import Future
from functools import partial

import pytest
import torch

from support.lost_ranks import (
    CASE,
    CROWDED_S,
    LONG_S,
    LOST_RANK,
    PHASES,
    SHORT_S,
    SLACK_S,
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


def come_late_to_the_group(rank, pg, pair: Pair, folder: str) -> Report | None:
    barrier(pg)
    if rank == LOST_RANK:
        wait_for_others(folder)
        with pytest.raises(TokenferryError):
            pair.open(pg, CASE.shape, timeout_s=CROWDED_S)
        return None
    with pytest.raises(PeerTimeout) as caught:
        pair.open(pg, CASE.shape, timeout_s=CROWDED_S)
    leave_note(folder, rank, "has reported")
    return report_of(caught.value)


SLEEPY_PHASES = ("dispatch", "combine", *PHASES[3:])


@pytest.fixture(scope="module", params=PAIRS, ids=str)
def reports(request, tmp_path_factory) -> dict[str, Future[list[Report]]]:
    """What ranks 0 and 1 report when rank 2 sleeps in a phase, is stopped, or does not come; all wait at once."""
    pair = request.param

    def folder() -> str:
        return str(tmp_path_factory.mktemp("late"))

    jobs = {phase: partial(sleep_in, pair=pair, loss=Loss(phase, folder(), CROWDED_S)) for phase in SLEEPY_PHASES}
    jobs["stopped"] = partial(sleep_in, pair=pair, loss=Loss("dispatch", folder(), CROWDED_S, is_stopped=True))
    jobs["does not come"] = partial(come_late_to_the_group, pair=pair, folder=folder())
    return run_at_once(3, pair.backend, jobs)


@pytest.mark.parametrize("phase", SLEEPY_PHASES)
def test_a_rank_that_sleeps(reports, phase):
    check_both_late(reports[phase].result(), phase, CROWDED_S)


def test_a_rank_that_is_stopped(reports):
    check_both_late(reports["stopped"].result(), "dispatch", CROWDED_S)


def test_a_rank_that_does_not_come(reports):
    found = reports["does not come"].result()
    for rank in (0, 1):
        report = found[rank]
        assert (report.phase, report.call, report.rank) == ("making the group", 0, rank)
        assert LOST_RANK in report.peers
        assert report.waited_s < CROWDED_S + SLACK_S


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
