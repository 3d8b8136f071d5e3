"""`ElasticBuffer` on one to four CPU ranks, against the oracle."""

import pytest
import torch

from support import deep_ep_elastic_ambient
from support import deep_ep_elastic_clients as clients
from support import deep_ep_elastic_jobs as jobs
from support.ambient import STATES


@pytest.mark.parametrize("case", jobs.CASES, ids=str)
def test_round_trips(worlds, case):
    worlds(4).run(jobs.round_trips, case)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks(worlds, ranks):
    worlds(ranks).run(jobs.round_trips, jobs.of_ranks(jobs.CASES[0], ranks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_rows_with_scales(worlds, dtype):
    worlds(4).run(jobs.scales, jobs.CASES[0], dtype)


def test_events(worlds):
    worlds(2).run(jobs.events, jobs.of_ranks(jobs.CASES[0], 2))


def test_barriers(worlds, tmp_path):
    worlds(3).run(jobs.barriers, tmp_path)


def test_many_handles(worlds):
    worlds(4).run(jobs.many_handles, jobs.CASES[1])


@pytest.mark.parametrize("case", [jobs.CASES[0], jobs.CASES[1]], ids=str)
def test_across_nodes(worlds, case):
    worlds(4).run(jobs.across_nodes, case, 2)


@pytest.mark.parametrize("client", clients.JOBS, ids=lambda job: job.__name__)
def test_clients(worlds, client):
    worlds(4).run(client)


@pytest.mark.parametrize("name", STATES)
def test_the_state_of_torch_has_no_say(worlds, name):
    assert min(worlds(2).run(deep_ep_elastic_ambient.compare, name)) > 70
