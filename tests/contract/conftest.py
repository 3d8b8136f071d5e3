"""Pairs of backend and transport that contract tests run on."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from support.pairs import CONTRACT_PAIRS, Pair


@pytest.fixture(params=CONTRACT_PAIRS, ids=str)
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread, as the ranks of a world do: jobs of one rank run in this process, and their tensors are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(worlds) -> Callable[..., list[Any]]:
    """``run(pair, ranks, job, *args)``: call ``job(rank, process_group, pair, *args)`` on every rank."""

    def on_ranks(pair: Pair, ranks: int, job: Callable[..., Any], *args: object) -> list[Any]:
        if pair.transport == "none":
            return [job(0, None, pair, *args)]
        per_node = (
            pair.ranks_per_node if pair.backend == "cuda" else None
        )  # else a group has them, and its ranks play none
        return worlds(ranks, pair.backend, per_node).run(job, pair, *args)

    return on_ranks
