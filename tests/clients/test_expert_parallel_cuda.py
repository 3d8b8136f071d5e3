"""`integrations.transformers` without transformers, on GPUs: gradients, and a call in a CUDA graph."""

import pytest
import torch

from support import expert_parallel_cuda_jobs as jobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("job", [jobs.trains, jobs.captures], ids=lambda job: job.__name__)
def test_a_layer(worlds, job):
    worlds(2, "cuda").run(job)
