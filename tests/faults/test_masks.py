"""Ranks that are lost to decode calls: the others go on, and the lost ones come back."""

import os
import signal
import time
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch

from support.children import end_process
from support.decoding import Step, check_combined, check_received
from support.lost_ranks import CROWDED_S, LONG_S
from support.masks import (
    CASE,
    LOST,
    Absence,
    Load,
    Notes,
    by_hand,
    in_a_graph,
    lost_in_replays,
    masked_meanwhile,
    other_calls_under_masks,
    sent_to_one,
    skip_and_return,
    under_load,
)
from support.new_sizes import Start, lost_at_the_start, new_sizes_apart, new_sizes_by_hand
from support.pairs import CPU_PAIRS, CUDA_PAIRS, NODES, NUM_GPUS, Pair
from support.worlds import run_at_once
from tokenferry import PeerTimeout
from tokenferry.testing.world import World, WorldError

TIMEOUT_S = 4.0

MASKABLE = (CPU_PAIRS[0], *CUDA_PAIRS)


JOBS = {
    "away from a dispatch": partial(skip_and_return, timeout_s=CROWDED_S, absence=Absence("dispatch")),
    "away from a dispatch by hook": partial(
        skip_and_return, timeout_s=CROWDED_S, absence=Absence("dispatch", hook=True)
    ),
    "away from a combine": partial(skip_and_return, timeout_s=CROWDED_S, absence=Absence("combine")),
    "masked by both sides": partial(by_hand, both_sides=True, timeout_s=30.0),
    "masked by one side": partial(by_hand, both_sides=False, timeout_s=CROWDED_S),
}


@pytest.fixture(scope="module", params=MASKABLE, ids=str)
def jobs(request, tmp_path_factory) -> dict[str, Future[list[None]]]:
    """All jobs; their ranks wait at the same time."""
    places = {name: {"pair": request.param, "folder": str(tmp_path_factory.mktemp("masks"))} for name in JOBS}
    return run_at_once(3, request.param.backend, {name: partial(job, **places[name]) for name, job in JOBS.items()})


@pytest.mark.parametrize("name", JOBS)
def test_a_rank_comes_back(jobs, name):
    jobs[name].result()


@pytest.mark.parametrize("pair", [*CPU_PAIRS, Pair("cpu", "process_group", ranks_per_node=1)], ids=str)
def test_hooks_that_are_pending_while_ranks_are_masked(worlds, pair):
    """What was under way between them is lost, and nobody waits for it."""
    worlds(3).run(masked_meanwhile, pair)


@pytest.mark.parametrize(("pair", "ranks"), [(CPU_PAIRS[0], 3), *((pair, 3) for pair in CUDA_PAIRS), *NODES[::3]])
def test_masks_are_of_decode_calls_alone(worlds, pair, ranks):
    """Across nodes, a dispatch lost rows of ranks that were masked, without a word."""
    worlds(ranks, pair.backend).run(other_calls_under_masks, pair)


def stop_under_load(pair: Pair, losses: Iterable[tuple[int, ...]], folder: Path) -> dict[tuple[int, ...], list[dict]]:
    """Run `under_load` for each tuple of ranks, in worlds that go on at the same time; return what ranks return."""
    worlds: dict[tuple[int, ...], World] = {}
    with ExitStack() as stack:
        for lost in losses:
            worlds[lost] = stack.enter_context(World(2 + len(lost), devices=pair.backend, timeout_s=120.0))
            notes_of(folder, lost).mkdir()
            load = Load(lost, 300, stopped=True)
            worlds[lost].submit(under_load, pair, str(notes_of(folder, lost)), TIMEOUT_S, load)
        stopped = [world.pids[rank] for lost, world in worlds.items() for rank in lost]
        try:
            for lost, world in worlds.items():
                await_notes(notes_of(folder, lost), "ready", range(world.num_ranks))
            time.sleep(0.3)  # somewhere
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            for lost, world in worlds.items():
                await_notes(notes_of(folder, lost), "went on", set(range(world.num_ranks)) - set(lost))
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        return {lost: world.collect() for lost, world in worlds.items()}


def notes_of(folder: Path, lost: tuple[int, ...]) -> Path:
    return folder / "-".join(map(str, lost))


LOSSES = [(2,), (0,), (3, 1)]
"""Ranks that are stopped: the last, the first, or two of them."""
STOPS = [
    pytest.param(CPU_PAIRS[0], LOSSES, id=str(CPU_PAIRS[0])),
    *(
        pytest.param(pair, [lost], id=f"{pair} {lost}")
        for pair in CUDA_PAIRS  # whose ranks share GPUs
        for lost in LOSSES
        if 2 + len(lost) <= max(NUM_GPUS, 3)
    ),
]


@pytest.mark.parametrize(("pair", "losses"), STOPS)
def test_processes_that_are_stopped_under_load_come_back(pair, losses, tmp_path):
    """They are stopped wherever they are; the others wait for them once, and go on for hundreds of iterations."""
    for lost, found in stop_under_load(pair, losses, tmp_path).items():
        for rank in set(range(2 + len(lost))) - set(lost):
            assert found[rank]["made"] >= 300, lost
            assert 1 <= found[rank]["masked"] <= 2 * len(lost), f"{lost} were waited for again and again"


def go_on_without(rank, pg, pair: Pair, folder: str, timeout_s: float) -> None:
    """Decode calls go on without the lost rank, which never comes back; the others still raise."""
    notes, step = Notes(folder, rank, 3), Step(CASE, rank, frozenset({LOST}))
    notes.barrier("begin")
    with pair.open(pg, CASE.shape, timeout_s=timeout_s, on_timeout="mask") as group:
        unmasked = Step(CASE, rank)
        sent = group.decode_dispatch(unmasked.mine().x, unmasked.routing())
        check_received(unmasked, sent, None)
        if rank == LOST:
            notes.wait("done", (0, 1))
            return
        late = group.decode_dispatch(step.mine().x, step.routing(), return_hook=rank == 1)
        late.hook()
        assert group.masked_ranks == {LOST}
        start = time.monotonic()
        for _ in range(3):
            sent = group.decode_dispatch(step.mine().x, step.routing())
            check_received(step, sent, None)
            check_combined(group, step, sent, torch.bfloat16)
            check_combined(group, step, sent, torch.float32, fast=True, hook=True)
        assert time.monotonic() - start < timeout_s * 9, "a masked rank was waited for again"
        with pytest.raises(PeerTimeout):
            group.dispatch(step.mine().x, step.routing())
        notes.leave("done")


CPU_JOBS = {
    "of another node": partial(
        skip_and_return,
        pair=Pair("cpu", "shared_memory", ranks_per_node=1),
        timeout_s=CROWDED_S,
        absence=Absence("combine"),
    ),
    "waited for by a rank that is waited for": partial(sent_to_one, pair=CPU_PAIRS[0], timeout_s=CROWDED_S),
    "for ever": partial(go_on_without, pair=CPU_PAIRS[0], timeout_s=CROWDED_S),
}


@pytest.fixture(scope="module")
def cpu_jobs(tmp_path_factory) -> dict[str, Future[list[None]]]:
    """All jobs; their ranks wait at the same time."""
    folders = {name: str(tmp_path_factory.mktemp("masks")) for name in CPU_JOBS}
    return run_at_once(3, "cpu", {name: partial(job, folder=folders[name]) for name, job in CPU_JOBS.items()})


def test_a_rank_of_another_node_comes_back(cpu_jobs):
    cpu_jobs["of another node"].result()


def test_ranks_that_wait_for_a_lost_one_do_not_lose_each_other(cpu_jobs):
    cpu_jobs["waited for by a rank that is waited for"].result()


def test_decoding_goes_on_without_a_rank_that_never_comes_back(cpu_jobs):
    cpu_jobs["for ever"].result()


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


NO_SHOWS = [
    pytest.param(pair, ranks, lost, id=f"{pair} {lost} of {ranks}")
    for pair in MASKABLE
    for ranks, lost in ((2, (1,)), (3, (2, 0)), (4, (1, 2)))
    if ranks <= max(NUM_GPUS, 3)
]


@pytest.mark.parametrize(("pair", "ranks", "lost"), NO_SHOWS)
def test_processes_that_end_before_their_first_call(pair, ranks, lost, tmp_path):
    timeout_s = 2 * LONG_S if pair.backend == "cpu" else TIMEOUT_S  # CPU transports see at once that a rank has died
    start = Start(lost, timeout_s, within_s=LONG_S, hook=len(lost) == 1, leave=end_process)
    with World(ranks, devices=pair.backend) as world, pytest.raises(WorldError) as caught:
        world.run(lost_at_the_start, pair, str(tmp_path), start)
    assert set(caught.value.errors) == set(lost), caught.value


@pytest.mark.parametrize("pair", MASKABLE, ids=str)
def test_a_process_that_is_stopped_before_its_first_call(pair, tmp_path):
    with World(2, devices=pair.backend) as world:
        world.submit(lost_at_the_start, pair, str(tmp_path), Start((1,), TIMEOUT_S, within_s=LONG_S, leave=stop))
        try:
            await_notes(tmp_path, "done", [0])
        finally:
            os.kill(world.pids[1], signal.SIGCONT)
        world.collect()


@pytest.mark.parametrize("pair", CUDA_PAIRS, ids=str)
def test_ranks_that_make_new_sizes_apart_come_together(worlds, pair, tmp_path):
    worlds(3, pair.backend).run(new_sizes_apart, pair, str(tmp_path), CROWDED_S)


@pytest.mark.parametrize("pair", CUDA_PAIRS, ids=str)
def test_a_new_size_under_masks_by_hand(worlds, pair, tmp_path):
    worlds(3, pair.backend).run(new_sizes_by_hand, pair, str(tmp_path))


@pytest.mark.parametrize("pair", CUDA_PAIRS, ids=str)
def test_graphs_see_masks(worlds, pair, tmp_path):
    worlds(3, pair.backend).run(in_a_graph, pair, str(tmp_path))


@pytest.mark.parametrize("pair", CUDA_PAIRS, ids=str)
def test_a_graph_outlives_a_rank_that_is_away(worlds, pair, tmp_path):
    worlds(3, pair.backend).run(lost_in_replays, pair, str(tmp_path), CROWDED_S, CASE)


def await_notes(folder: Path, what: str, ranks) -> None:
    deadline = time.monotonic() + 100.0
    while not all((folder / f"{what} {rank}").exists() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.01)
