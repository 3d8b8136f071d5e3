"""Groups of threads whose kernels the emulator runs."""

from collections.abc import Callable
from typing import Any

import pytest

from support.emulated_group import EmulatedPair, Threads, emulate
from tokenferry import MoeShape
from tokenferry.api import ExpertGroup
from tokenferry.compat.deep_ep import expert_buffer


@pytest.fixture
def run(pytestconfig) -> Callable[..., list[Any]]:
    """``run(R, job, *args)``: call ``job(rank, threads, pair, *args)`` in R threads."""
    return emulate(pytestconfig)


@pytest.fixture(params=["on", "off"])
def both_paths(request, monkeypatch) -> None:
    """Make groups whose calls may take the fast path, then groups whose calls may not."""
    monkeypatch.setenv("TOKENFERRY_FAST_PATH", request.param)


class Member:
    """Stands for the process group of a rank."""

    def __init__(self, rank: int, threads: Threads, pair: EmulatedPair) -> None:
        self.rank, self.threads, self.pair = rank, threads, pair

    def size(self) -> int:
        return self.threads.size()

    def barrier(self) -> Any:
        return self.threads.barrier()


@pytest.fixture
def buffers(run, monkeypatch) -> Callable[..., list[Any]]:
    """``buffers(R, job, *args)``: call ``job(rank, group, *args)`` in R threads, whose buffers make emulated groups.

    ``ranks_per_node=`` makes them several nodes.
    """

    def with_heap(
        member: Member, *, on_timeout: str = "raise", put_bytes: int | None = None, **_: object
    ) -> ExpertGroup:
        shape = MoeShape(member.size(), 1, 16, 1)
        return member.pair.open(member.threads, shape, on_timeout=on_timeout, put_bytes=put_bytes)

    def member_job(rank: int, threads: Threads, pair: EmulatedPair, job: Callable[..., Any], *args: Any) -> Any:
        return job(rank, Member(rank, threads, pair), *args)

    monkeypatch.setattr(ExpertGroup, "_with_heap", with_heap)
    monkeypatch.setattr(expert_buffer, "check_group", Member.size)
    return lambda ranks, job, *args, **nodes: run(ranks, member_job, job, *args, **nodes)
