"""The kernels of `tokenferry limits` on GPUs: their rows are compared, their waits end."""

import time

import pytest
import torch

from support.bench_jobs import discard
from tokenferry.bench.suites.limits import LimitSettings, measure_limits
from tokenferry.bench.suites.links import CudaLinks
from tokenferry.errors import PeerTimeout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SMALL = LimitSettings(
    num_sms=(1, 3, 24), row_bytes=(16, 7168, 14336), total_bytes=7168 * 301, runs=2, launches=2, iterations=3
)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_row_is_where_it_belongs(worlds, num_ranks):
    found = worlds(num_ranks, "cuda").run(measure_limits, discard, SMALL)[0]
    assert len(found.rates) == 3 * 3 * 3
    assert all(rate.gbps > 0 for rate in found.rates)


def alone(rank, pg, _):
    """Rank 0 waits for a rank that does not come; the context stays usable."""
    device = torch.device("cuda", torch.cuda.current_device())
    with CudaLinks(pg, device, 0, 0.5) as links:
        if rank == 0:
            start = time.monotonic()
            links.barrier()
            torch.cuda.synchronize()
            assert time.monotonic() - start < 5
            with pytest.raises(PeerTimeout, match=r"rank 0 waited 0\.5 s in a kernel for rank 1"):
                links.check()
        torch.distributed.barrier(pg)
        assert torch.ones(3, device=device).sum().item() == 3
    return True


def test_a_wait_ends(worlds):
    assert worlds(2, "cuda").run(alone, None) == [True] * 2
