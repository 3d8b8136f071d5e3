"""`ElasticBuffer` and `EPBuffer` on GPUs: the jobs of the CPU, streams, CUDA graphs."""

import pytest
import torch

from support import deep_ep_elastic_cuda_jobs as cuda_jobs
from support import deep_ep_elastic_jobs as jobs
from tokenferry.testing.cases import Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

RANKS = 2
LARGE = Case((512, 300), experts=16, top_k=4, hidden=2048)


@pytest.mark.parametrize("case", jobs.CASES[:3], ids=str)
def test_round_trips(worlds, case):
    worlds(RANKS, "cuda").run(cuda_jobs.as_on_the_cpu, "round_trips", jobs.of_ranks(case, RANKS))


@pytest.mark.parametrize("case", jobs.CASES[:2], ids=str)
def test_deferred_round_trips(worlds, case):
    worlds(RANKS, "cuda").run(cuda_jobs.deferred_as_on_the_cpu, "round_trips", jobs.of_ranks(case, RANKS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_rows_with_scales(worlds, dtype):
    worlds(RANKS, "cuda").run(cuda_jobs.as_on_the_cpu, "scales", jobs.of_ranks(jobs.CASES[0], RANKS), dtype)


def test_events(worlds):
    worlds(RANKS, "cuda").run(cuda_jobs.as_on_the_cpu, "events", jobs.of_ranks(jobs.CASES[0], RANKS))


def test_barriers(worlds, tmp_path):
    worlds(RANKS, "cuda").run(jobs.barriers, tmp_path)


STREAM_JOBS = (cuda_jobs.graph, cuda_jobs.late_inputs, cuda_jobs.other_streams, cuda_jobs.graph_on_streams)


@pytest.mark.parametrize("job", STREAM_JOBS, ids=lambda job: job.__name__)
def test_streams(worlds, job):
    worlds(RANKS, "cuda").run(job, LARGE)
