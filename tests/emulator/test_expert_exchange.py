"""`integrations.transformers.ExpertParallel` on the CUDA backend, without gradients; the emulator runs its kernels."""

from types import SimpleNamespace

import pytest
import torch

from support import expert_parallel_jobs as jobs
from support.emulator import Emulator
from tokenferry.api import ExpertGroup
from tokenferry.integrations import transformers as ours
from tokenferry.integrations.exchange import Sharers

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))


class Member:
    """Stands for the process group of a rank."""

    def __init__(self, ranks, threads, pair):
        self.ranks, self.threads, self.pair = ranks, threads, pair

    def rank(self):
        return 0

    def size(self):
        return len(self.ranks)


def infers(rank, threads, pair, *, shares_batch):
    """Counts on the host, of any number of tokens, or on the device, with memory for those of this batch."""
    everyone = list(range(jobs.R))
    members = (Member(everyone, threads, pair), Member(everyone if shares_batch else [rank], threads, pair))
    ep_mesh, tp_mesh = (SimpleNamespace(get_group=lambda each=each: each) for each in members)
    parallel = ours.ExpertParallel(jobs.Experts(jobs.all_experts().chunk(jobs.R)[rank]), ep_mesh, tp_mesh)
    parallel.sharers = Sharers(members[1], 0, 1)  # each rank has a batch, since threads have no all-gather
    for tokens, top_k in ((6, 3), (1, 3), (5, 2)):
        count = tokens if shares_batch or rank else 0
        x, index, weights = jobs.batch(rank, count, top_k)
        with torch.no_grad():  # of this thread
            out = parallel(x, index, weights)
        torch.testing.assert_close(out, jobs.dense_layer(jobs.all_experts(), x, index, weights), rtol=1e-5, atol=1e-5)
    ours._groups.pop(members[0]).synchronize()


@pytest.mark.parametrize("shares_batch", [False, True])
def test_like_ranks_on_the_cpu(run, monkeypatch, shares_batch):
    def with_heap(member, *, heap_bytes, shape):
        return member.pair.open(member.threads, shape)

    monkeypatch.setattr(ExpertGroup, "_with_heap", with_heap)
    monkeypatch.setattr(ours.dist, "get_process_group_ranks", lambda member: member.ranks)
    run(jobs.R, lambda *args: infers(*args, shares_batch=shares_batch))
