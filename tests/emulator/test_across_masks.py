"""Ranks of several nodes that are lost to decode calls, and come back, over a network of the tests."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from support import deep_ep_decode_jobs, node_masks
from support.emulated_group import Puts, SynchronousJit, SynchronousKernel, emulate, in_processes
from support.emulator import Emulator
from support.fake_network import Put, Weather
from support.masks import Absence, by_hand, make_all_calls, other_calls_under_masks, skip_and_return
from support.node_masks import CASE, LOST, NodeAbsence

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))

TIMEOUT_S = 8.0
"""A quarter of it is enough for threads that share the processors with those of other jobs."""
STORM = Weather(delay_s=0.004, reorder=True, seed=7)
MAPPED = {"all": lambda rank: True, "some": lambda rank: rank % 3 == 0, "none": lambda rank: False}


def puts(mapped: str = "none", weather: Weather = STORM) -> Puts:
    return Puts(weather, MAPPED[mapped], CASE.shape)


def on_nodes(
    nodes: tuple[int, int],
    job: Callable[..., Any],
    *args: object,
    run: Callable[..., list[Any]],
    mapped: str = "none",
    path: str = "on",
) -> list[Any]:
    """Run a job on so many nodes of so many ranks, on one path of calls."""
    os.environ["TOKENFERRY_FAST_PATH"] = path  # of a process that ends with the job
    return run(nodes[0] * nodes[1], job, *args, ranks_per_node=nodes[1], puts=puts(mapped))


# ---------------------------------------------------------------------- nodes of one rank

ALONE = {
    "away from a dispatch by hook": (
        "some",
        partial(skip_and_return, timeout_s=TIMEOUT_S, absence=Absence("dispatch", hook=True)),
    ),
    "away from a combine": ("all", partial(skip_and_return, timeout_s=TIMEOUT_S, absence=Absence("combine"))),
    "masked by both sides": ("some", partial(by_hand, timeout_s=TIMEOUT_S, both_sides=True)),
    "masked by one side": ("some", partial(by_hand, timeout_s=TIMEOUT_S, both_sides=False)),
}
PATHS = ("on", "off")


@pytest.fixture(scope="module")
def alone(pytestconfig, tmp_path_factory) -> dict[tuple[str, str], Future[list[list[None]]]]:
    """All these jobs; their ranks wait at the same time."""
    todo = {
        (name, path): partial(on_nodes, (3, 1), job, str(tmp_path_factory.mktemp("masks")), mapped=mapped, path=path)
        for name, (mapped, job) in ALONE.items()
        for path in PATHS
    }
    return in_processes(pytestconfig, partial(on_nodes, (3, 1), make_all_calls), todo)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ALONE)
def test_a_node_comes_back(alone, name, path):
    alone[name, path].result()


@pytest.mark.usefixtures("both_paths")
def test_a_buffer_in_shrink_mode(buffers, monkeypatch):
    """Its memory for puts is as large as DeepEP's function says."""
    monkeypatch.setenv("TOKENFERRY_NETWORK", "nvshmem")
    monkeypatch.setenv("TOKENFERRY_RANKS_PER_NODE", "1")
    case = deep_ep_decode_jobs.CASES[0]
    buffers(4, deep_ep_decode_jobs.shrink, case, ranks_per_node=1, puts=Puts(STORM, MAPPED["some"]))


# ---------------------------------------------------------------------- nodes of two ranks

ABSENCES = [
    (NodeAbsence("dispatch"), "none"),
    (NodeAbsence("dispatch", hook=True), "all"),
    (NodeAbsence("combine"), "some"),
    (NodeAbsence("combine", hook=True, fast=True), "none"),
]


def lose_a_put(folder: str, *, run: Callable[..., list[Any]]) -> None:
    armed = threading.Event()

    def is_lost(put: Put) -> bool:
        return armed.is_set() and (put.sender, put.rank) == (LOST, 1)

    storm = Weather(reorder=True, loses=is_lost)
    run(4, node_masks.lose_a_put, folder, TIMEOUT_S, armed, ranks_per_node=2, puts=puts("none", storm))


@pytest.fixture(scope="module")
def pairs(pytestconfig, tmp_path_factory) -> dict[object, Future[list[Any]]]:
    """All jobs of nodes of two ranks; their ranks wait at the same time."""

    def folder() -> str:
        return str(tmp_path_factory.mktemp("masks"))

    def job(job: Callable[..., Any], *args: object, **mapped: str) -> partial:
        return partial(on_nodes, (2, 2), job, *args, **mapped)

    todo = {
        **{
            absence: job(node_masks.lose_on_two_nodes, folder(), TIMEOUT_S, absence, mapped=mapped)
            for absence, mapped in ABSENCES
        },
        "a lost put": partial(lose_a_put, folder()),
        "never calls": job(node_masks.lost_from_the_start, folder(), TIMEOUT_S),
        "warmup": job(node_masks.meet_without_one, TIMEOUT_S),
    }
    return in_processes(pytestconfig, job(node_masks.make_all_calls), todo)


@pytest.mark.parametrize("absence", [absence for absence, _ in ABSENCES], ids=str)
def test_a_rank_that_is_away_comes_back(pairs, absence):
    """Only those that wait for it find that it is lost, and none of them is taken for lost because it waits."""
    [waited] = pairs[absence].result()
    least = TIMEOUT_S / 2 * 0.8
    assert min(waited[1], waited[2]) > least * 1e9, "the wait for it counts for it"


def test_a_lost_put_parts_two_ranks(pairs):
    pairs["a lost put"].result()


def test_a_rank_that_never_calls(pairs):
    pairs["never calls"].result()


def test_warmup_masks_a_rank_that_does_not_come(pairs):
    pairs["warmup"].result()


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("lost", [(3,), (2, 3), (1, 2)], ids=str)
def test_ranks_masked_by_hand(run, lost):
    run(4, node_masks.masked_by_hand, lost, ranks_per_node=2, puts=Puts(STORM, MAPPED["some"]))


@pytest.mark.usefixtures("both_paths")
def test_masks_are_of_decode_calls_alone(run):
    run(4, other_calls_under_masks, ranks_per_node=2, puts=Puts(STORM, MAPPED["some"]))


def test_synchronize_completes_what_was_put(run):
    """Also for hooks that are open: ranks that resynchronise would take it for something new."""
    late = threading.Event()
    slow = Weather(delay_s=1.0, is_late=lambda rank: late.is_set(), seed=7)
    run(4, node_masks.synchronize_with_an_open_hook, late, ranks_per_node=2, puts=puts("none", slow))


# ---------------------------------------------------------------------- the same launches again


class Keep(TorchDispatchMode):
    """Keeps all tensors that are made, as the memory of a CUDA graph is kept."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._kept.append(made)
        return made


class Launches(threading.local):
    """What kernels got while this thread recorded; None: it does not."""

    now: list[Any] | None = None


LAUNCHES = Launches()


class RecordedKernel(SynchronousKernel):
    """A kernel that notes its launches."""

    def launch(self, params: Any, grid: int, block: int, smem_bytes: int, stream: int) -> None:
        if LAUNCHES.now is not None:
            copied = type(params).from_buffer_copy(params)
            LAUNCHES.now.append((self, copied, grid, block, smem_bytes, stream))
        super().launch(params, grid, block, smem_bytes, stream)


class RecordedJit(SynchronousJit):
    kernel_type = RecordedKernel


class Recorder:
    """Records the launches of a thread, and makes them again."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    @contextmanager
    def record(self, context: Any) -> Iterator[list[Any]]:
        """Record, and keep all memory of the calls."""
        empty = context.empty

        def kept_empty(*args: Any) -> Any:
            self._kept.append(empty(*args))
            return self._kept[-1]

        context.empty, LAUNCHES.now = kept_empty, []
        try:
            with Keep(self._kept):
                yield LAUNCHES.now
        finally:
            context.empty, LAUNCHES.now = empty, None

    def replay(self, launches: list[Any]) -> None:
        for kernel, *launch in launches:
            kernel.launch(*launch)


def test_a_rank_that_does_not_replay(pytestconfig, tmp_path):
    """The launches of the others see what has happened since they were recorded, and that the rank has come back."""
    run = emulate(pytestconfig, RecordedJit)
    run(4, node_masks.lose_in_replays, Recorder(), str(tmp_path), TIMEOUT_S, ranks_per_node=2, puts=puts("some"))
