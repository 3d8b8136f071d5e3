"""`ElasticBuffer` and `EPBuffer` on the CUDA backend, whose kernels the emulator runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from support import deep_ep_deferred_jobs, deep_ep_elastic_ambient
from support import deep_ep_elastic_clients as clients
from support import deep_ep_elastic_jobs as jobs
from support.ambient import STATES, same
from support.emulated_group import EmulatedPair, Threads
from support.emulator import Emulator
from tokenferry import MoeShape
from tokenferry.api import ExpertGroup

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))


class Member:
    """Stands for the process group of a rank."""

    def __init__(self, rank: int, threads: Threads, pair: EmulatedPair) -> None:
        self.rank, self.threads, self.pair = rank, threads, pair

    def size(self) -> int:
        return self.threads.size()


@pytest.fixture
def elastic(run, monkeypatch) -> Callable[..., list[Any]]:
    """``elastic(R, job, *args)``: call ``job(rank, group, *args)`` in R threads, whose buffers make emulated groups."""

    def with_heap(member: Member, **_: object) -> ExpertGroup:
        return member.pair.open(member.threads, MoeShape(member.size(), 1, 16, 1))

    def member_job(rank: int, threads: Threads, pair: EmulatedPair, job: Callable[..., Any], *args: Any) -> Any:
        return job(rank, Member(rank, threads, pair), *args)

    monkeypatch.setattr(ExpertGroup, "_with_heap", with_heap)
    return lambda ranks, job, *args: run(ranks, member_job, job, *args)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_round_trips(elastic, ranks):
    for case in jobs.CASES[: 3 if ranks > 1 else 1]:
        elastic(ranks, jobs.round_trips, jobs.of_ranks(case, ranks))


def test_rows_with_scales(elastic):
    elastic(2, jobs.scales, jobs.of_ranks(jobs.CASES[0], 2), torch.int32)


@pytest.mark.parametrize("job", [jobs.events, jobs.many_handles])
def test_like_ranks_on_the_cpu(elastic, job):
    elastic(2, job, jobs.of_ranks(jobs.CASES[1], 2))


def test_barriers(elastic, tmp_path):
    elastic(2, jobs.barriers, tmp_path)


def test_deferred_calls(elastic, monkeypatch):
    elastic(2, deep_ep_deferred_jobs.deferred, jobs.of_ranks(jobs.CASES[0], 2))
    monkeypatch.setattr(jobs, "ElasticBuffer", deep_ep_deferred_jobs.Deferring)
    elastic(2, jobs.round_trips, jobs.of_ranks(jobs.CASES[1], 2))


@pytest.mark.parametrize("client", clients.JOBS, ids=lambda job: job.__name__)
def test_clients(elastic, client):
    elastic(2, client)


def stated(rank, pg, name):
    with STATES[name].of_a_thread("cpu"):
        return deep_ep_elastic_ambient.program(rank, pg)


@pytest.mark.parametrize("name", STATES)
def test_the_state_of_torch_has_no_say(elastic, name):
    plain = elastic(2, deep_ep_elastic_ambient.program)
    with STATES[name].of_the_process():
        found = elastic(2, stated, name)
    assert min(same(got, want) for got, want in zip(found, plain, strict=True)) > 70
