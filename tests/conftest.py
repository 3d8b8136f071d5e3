"""Fixtures that all tests share."""

import gc
import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch
import torch.distributed.tensor  # assert_close does it later than the server of ranks needs it

from support.pools import forget_compiled, prefer
from tokenferry.testing.world import World

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


@pytest.fixture(scope="session")
def worlds() -> Iterator[Callable[..., World]]:
    """Return pools of ranks, one per R and kind of device for the whole session; a new one after a job failed.

    ``worlds(4).run(fn, ...)`` runs on the CPU, ``worlds(4, "cuda").run(fn, ...)`` on ranks that own a GPU, and
    ``worlds(4, "cuda", 2).run(fn, ...)`` on ranks of which two each play a node.
    """
    pools: dict[tuple[int, str, int | None], World] = {}

    def get(num_ranks: int, devices: str = "cpu", ranks_per_node: int | None = None) -> World:
        key = num_ranks, devices, ranks_per_node
        if key not in pools or not pools[key].alive:
            pools[key] = World(num_ranks, devices=devices, timeout_s=JOB_S, ranks_per_node=ranks_per_node)
            pools[key].run(prefer, devices)
        else:
            pools[key].run(forget_compiled)
        return pools[key]

    yield get
    for pool in pools.values():
        pool.close()
