"""Jobs of `HybridEPBuffer` for ranks with GPUs: those of the CPU on a buffer that carries, and a job with a graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from support import deep_ep_cuda_jobs as cuda_jobs
from support import deep_ep_hybrid_jobs as jobs
from support.deep_ep_hybrid_jobs import Deal
from tokenferry.compat.deep_ep import HybridEPBuffer
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import same_bits


class CarryingHybrid(HybridEPBuffer):
    """A `HybridEPBuffer` that takes CPU tensors, as the jobs of the CPU have them, and brings results back."""

    def dispatch_with_permute(self, **how: Any) -> Any:
        *results, handle = super().dispatch_with_permute(**cuda_jobs.there(how))
        return (*map(_back, results), handle)

    def combine_with_unpermute(self, **how: Any) -> Any:
        return tuple(map(_back, super().combine_with_unpermute(**cuda_jobs.there(how))))


def _back(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.cpu()


def as_on_the_cpu(rank: int, pg: Any, job: str, case: Case) -> None:
    with mock.patch.object(jobs, "HybridEPBuffer", CarryingHybrid):
        getattr(jobs, job)(rank, pg, case)


def graph(rank: int, pg: Any, case: Case) -> None:
    """With a budget both directions can be captured, and replayed with other rows and another routing."""
    buffer = jobs.buffer_for(pg, case)
    one, other = (Deal(rank, replace(case, seed=seed), 4) for seed in range(2))
    budget = max(deal.oracle.num_delivered(r) for deal in (one, other) for r in range(case.ranks))
    given, x = cuda_jobs.there(one.arguments()), cuda_jobs.there(one.mine.x)

    def both_ways() -> Any:
        got, probs, _, counts, handle = buffer.dispatch_with_permute(hidden=x, num_permuted_tokens=budget, **given)
        out, back = buffer.combine_with_unpermute(hidden=got, probs=probs, handle=handle, pad_multiple=4)
        return got, counts, handle[-1], out, back

    both_ways()
    replay, (got, counts, flag, out, back) = cuda_jobs.captured(both_ways)
    for deal in (other, one, other):
        x.copy_(deal.mine.x)
        given["routing_map"].copy_(deal.routing_map)
        given["probs"].copy_(deal.probs)
        replay()
        places = [row.place for row in deal.oracle.rows(rank)]
        same_bits("hidden", got.cpu()[places], deal.oracle.x(rank))
        assert counts.tolist() == deal.padded
        assert flag.item() == 0
        copies = deal.routing_map.sum(1, keepdim=True)
        torch.testing.assert_close(out.cpu().float(), deal.mine.x.float() * copies, rtol=1e-2, atol=1e-2)
        same_bits("combined probs", back, deal.probs)
