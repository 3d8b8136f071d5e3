"""`ElasticBuffer` and `EPBuffer` on the CUDA backend, whose kernels the emulator runs."""

import pytest
import torch

from support import deep_ep_deferred_jobs, deep_ep_elastic_ambient
from support import deep_ep_elastic_clients as clients
from support import deep_ep_elastic_jobs as jobs
from support.ambient import STATES, same
from support.emulator import Emulator

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_round_trips(buffers, ranks):
    for case in jobs.CASES[: 3 if ranks > 1 else 1]:
        buffers(ranks, jobs.round_trips, jobs.of_ranks(case, ranks))


@pytest.mark.usefixtures("both_paths")
def test_rows_with_scales(buffers):
    buffers(2, jobs.scales, jobs.of_ranks(jobs.CASES[0], 2), torch.int32)


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("job", [jobs.events, jobs.many_handles])
def test_like_ranks_on_the_cpu(buffers, job):
    buffers(2, job, jobs.of_ranks(jobs.CASES[1], 2))


def test_barriers(buffers, tmp_path):
    buffers(2, jobs.barriers, tmp_path)


@pytest.mark.usefixtures("both_paths")
def test_deferred_calls(buffers, monkeypatch):
    buffers(2, deep_ep_deferred_jobs.deferred, jobs.of_ranks(jobs.CASES[0], 2))
    monkeypatch.setattr(jobs, "ElasticBuffer", deep_ep_deferred_jobs.Deferring)
    buffers(2, jobs.round_trips, jobs.of_ranks(jobs.CASES[1], 2))


@pytest.mark.parametrize("client", clients.JOBS, ids=lambda job: job.__name__)
def test_clients(buffers, client):
    buffers(2, client)


def stated(rank, pg, name):
    with STATES[name].of_a_thread("cpu"):
        return deep_ep_elastic_ambient.program(rank, pg)


@pytest.mark.parametrize("name", STATES)
def test_the_state_of_torch_has_no_say(buffers, name):
    plain = buffers(2, deep_ep_elastic_ambient.program)
    with STATES[name].of_the_process():
        found = buffers(2, stated, name)
    assert min(same(got, want) for got, want in zip(found, plain, strict=True)) > 70
