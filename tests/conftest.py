"""Fixtures that all tests share."""

from collections.abc import Callable, Iterator

import pytest

from tokenferry.testing.world import World


@pytest.fixture(scope="session")
def worlds() -> Iterator[Callable[[int], World]]:
    """One pool of ranks per R for the whole session: ``worlds(4).run(fn, ...)``; made anew after a job failed."""
    pools: dict[int, World] = {}

    def get(num_ranks: int) -> World:
        if num_ranks not in pools or not pools[num_ranks].alive:
            pools[num_ranks] = World(num_ranks)
        return pools[num_ranks]

    yield get
    for pool in pools.values():
        pool.close()
