"""Fixtures that all tests share."""

import gc
import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch
import torch.distributed.tensor  # assert_close does it later than the server of ranks needs it

from support.pools import forget_compiled, meet, prefer
from tokenferry.testing.world import World, WorldError

# No test is timed: an example may take long on a busy machine.
hypothesis.settings.register_profile("tokenferry", deadline=None)
hypothesis.settings.load_profile("tokenferry")

JOB_S = 240.0
"""Seconds for a job: ranks that share a GPU wait milliseconds for their turn, many times a call; others compile."""

# Tests that name no backend test the CPU's, with tensors on the CPU. On a machine with GPUs "auto" would choose the
# other one, also in the examples of documents and in ranks that are forked later.
if torch.cuda.is_available():
    os.environ.setdefault("TOKENFERRY_BACKEND", "cpu")
else:
    # Threads of torch in two processes of pytest, and in each thread of the emulator, would wait for one another, and
    # spin meanwhile: on two cores that takes five times as long. The variable is for programs that tests start.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


WORKERS = 2
"""Processes for `pytest -n auto`: tests with ranks keep several cores busy themselves."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes run tests: those on GPUs would wait for one another."""
    return 0 if torch.cuda.is_available() else min(WORKERS, os.cpu_count() or 1)


def pytest_collection_finish() -> None:
    """Leave the modules and the thousands of tests out of all later collections of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_is_compiled() -> None:
    """Start each test with a compiler that knows nothing of the tests before; `worlds` does so in its ranks."""
    forget_compiled()


class Pools:
    """Pools of ranks, one per R and kind of device; a new one after a job failed.

    ``worlds(4).run(fn, ...)`` runs on the CPU, ``worlds(4, "cuda").run(fn, ...)`` on ranks that own a GPU, and
    ``worlds(4, "cuda", 2).run(fn, ...)`` on ranks of which two each play a node.
    """

    def __init__(self) -> None:
        self._pools: dict[tuple[int, str, int | None], World] = {}
        self._used: set[World] = set()

    def __call__(self, num_ranks: int, devices: str = "cpu", ranks_per_node: int | None = None) -> World:
        key = num_ranks, devices, ranks_per_node
        if key in self._pools and self._pools[key].alive:
            self._pools[key].run(forget_compiled)
        else:
            self._pools[key] = World(num_ranks, devices=devices, timeout_s=JOB_S, ranks_per_node=ranks_per_node)
            self._pools[key].run(prefer, devices)
        self._used.add(self._pools[key])
        return self._pools[key]

    def check(self) -> None:
        """Raise if the test has ended the process group of a pool: later tests would fail because of it."""
        used, self._used = self._used, set()
        errors = []
        for pool in used:
            if pool.alive:
                try:
                    pool.run(meet)
                except WorldError as error:  # the other pools may have ended in this test, too
                    errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


@pytest.fixture(scope="session")
def worlds() -> Iterator[Pools]:
    """Return pools of ranks for the whole session."""
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture(autouse=True)
def process_groups_outlive_tests(worlds: Pools) -> Iterator[None]:
    """Check the pools that a test has used; one that breaks a group of several nodes needs a world of its own."""
    yield
    worlds.check()
