"""A Mixture-of-Experts layer whose experts are reached through torch's all_to_all_single, for comparison."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from tokenferry.nn.sharding import averaged_gradient
from tokenferry.types import Routing


class AllToAllLayer(nn.Module):
    """For each token the sum of ``w_k * expert_k(x)`` over its choices, as `tokenferry.nn.MoELayer`.

    The way that training programs take without a library: a copy of a row for each of its choices, sorted by expert;
    an exchange of counts, for which the host waits; the rows; and the same back.

    Contract: collective, forward and backward. The gradients of the experts are those of the mean over ranks of the
    ranks' losses, and complete.

    Args:
        pg: The process group, whose backend moves tensors of the experts' device.
        experts: As in `tokenferry.nn.MoELayer`; it holds the L experts of this rank.
        router: Maps ``[T, H]`` to a `Routing` with weights.
        num_experts: E.
    """

    def __init__(
        self, pg: dist.ProcessGroup, experts: nn.Module, router: Callable[[Tensor], Routing], num_experts: int
    ) -> None:
        super().__init__()
        self.pg, self.experts, self.router, self.num_experts = pg, experts, router, num_experts

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[T, H]`` for ``[T, H]``; under autocast, experts compute and rows travel in its dtype."""
        routing = self.router(x)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        choices = routing.topk_idx.flatten()
        order = choices.argsort(stable=True)  # of the (token, choice) pairs, by expert and so by rank
        tokens = order // routing.topk_idx.shape[1]
        sent, received, by_source = self._counts(choices)
        arrived = all_to_all_single_autograd(x.to(dtype)[tokens], received, sent, self.pg)
        place = _by_expert(by_source)
        offsets = nn.functional.pad(by_source.sum(0).cumsum(0), (1, 0)).int()
        weights = {
            name: averaged_gradient(weight, self.pg.size()).to(dtype)
            for name, weight in self.experts.named_parameters()
        }
        y = torch.func.functional_call(self.experts, weights, (arrived[place], offsets))
        home = all_to_all_single_autograd(_put_back(y, place), sent, received, self.pg)
        assert routing.topk_weights is not None
        scaled = home * routing.topk_weights.flatten()[order].unsqueeze(1).to(dtype)
        return torch.zeros_like(x, dtype=dtype).index_add(0, tokens, scaled)

    def _counts(self, choices: Tensor) -> tuple[list[int], list[int], Tensor]:
        """Return the rows to each rank, those from each rank, and ``[R, L]``: those from each rank to each expert."""
        num_ranks = self.pg.size()
        counts = torch.bincount(choices, minlength=self.num_experts).view(num_ranks, -1)
        by_source = torch.empty_like(counts)
        dist.all_to_all_single(by_source, counts, group=self.pg)
        sent, received = torch.stack([counts.sum(1), by_source.sum(1)]).tolist()  # the host waits
        return sent, received, by_source


def _by_expert(by_source: Tensor) -> Tensor:
    """Return which row that arrived is at each place of the rows by expert."""
    num_ranks, num_local = by_source.shape
    experts = torch.arange(num_local, dtype=torch.int64, device=by_source.device).repeat(num_ranks)
    return experts.repeat_interleave(by_source.flatten()).argsort(stable=True)


def _put_back(y: Tensor, place: Tensor) -> Tensor:
    return torch.zeros_like(y).index_copy(0, place, y)
