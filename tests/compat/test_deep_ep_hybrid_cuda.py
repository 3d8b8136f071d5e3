"""`HybridEPBuffer` on GPUs: the jobs of the CPU, and CUDA graphs."""

import pytest
import torch

from support import deep_ep_hybrid_cuda_jobs as cuda_jobs
from tokenferry.testing.cases import Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

RANKS = 2


@pytest.mark.parametrize("job", ["round_trips", "overflows", "scales"])
def test_as_on_the_cpu(worlds, job):
    worlds(RANKS, "cuda").run(cuda_jobs.as_on_the_cpu, job, Case((5, 3), experts=8, top_k=3, hidden=16))


def test_graphs(worlds):
    worlds(RANKS, "cuda").run(cuda_jobs.graph, Case((256, 130), experts=16, top_k=4, hidden=512))
