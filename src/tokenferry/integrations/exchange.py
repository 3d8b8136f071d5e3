"""The exchange around the experts of one layer, of a batch that several ranks may share, with gradients.

Its calls take less time on the GPU than on the host, so each direction is one function of autograd over plain calls:

============ ========================================= ==========================================================
forward      does                                      backward
============ ========================================= ==========================================================
`send`       takes this rank's part of the batch, and  brings gradients of rows and weights back, and gathers them
             dispatches it
`bring_back` combines, and gathers the parts           takes this rank's part of the gradient, and dispatches it
                                                       again along the same plan
============ ========================================= ==========================================================

These functions are those of `tokenferry.autograd.eager`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.autograd.common import for_weights
from tokenferry.autograd.eager import Calls, Sent
from tokenferry.types import DispatchOptions, Plan, Quantized, Routing

# torch 2.13 has renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True, eq=False)
class Sharers:
    """The ranks with the same batch, of which each sends its part: ceil(T / R) tokens, the last ones fewer or none.

    Attributes:
        process_group: These ranks.
        rank: The place of this one among them.
        num_ranks: Their number, R.
    """

    process_group: dist.ProcessGroup
    rank: int
    num_ranks: int

    def most(self, num_tokens: int) -> int:
        """Return the tokens of the largest part of so many."""
        return -(-num_tokens // self.num_ranks)

    def part(self, whole: Tensor) -> Tensor:
        """Return the rows of this rank, contiguous."""
        if self.num_ranks > 1:
            most = self.most(whole.shape[0])
            whole = whole[self.rank * most : (self.rank + 1) * most]
        return whole.contiguous()

    def whole(self, part: Tensor, num_tokens: int) -> Tensor:
        """Return the ``[T, ...]`` of which each rank has its part. Collective."""
        if self.num_ranks == 1 or num_tokens == 0:
            return part
        most = self.most(num_tokens)
        if part.shape[0] < most:
            part = torch.nn.functional.pad(part, (0, 0, 0, most - part.shape[0]))
        whole = torch.empty(most * self.num_ranks, part.shape[1], dtype=part.dtype, device=part.device)
        _all_gather(whole, part, group=self.process_group)
        # Not a slice: what is written into views that come out of a function of autograd is refused.
        return whole if whole.shape[0] == num_tokens else whole.resize_(num_tokens, part.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Received:
    """What the experts of this rank are to compute.

    Attributes:
        rows: ``[N, H]``, by expert.
        weights: ``[N]``, of the dtype of those that were sent.
        offsets: ``[L + 1]`` int32: first row of each expert, then the end; later rows hold no data.
        plan: The way back.
    """

    rows: Tensor
    weights: Tensor
    offsets: Tensor
    plan: Plan


@dataclass(frozen=True, slots=True, eq=False)
class BatchExchange(Calls):
    """One exchange: the group that moves the rows, and the batch that they are from.

    Attributes:
        group: The group, or a view of it for the sizes of this batch.
        sharers: The ranks that have the batch.
        num_tokens: T of the batch.
    """

    group: ExpertGroup
    sharers: Sharers
    num_tokens: int

    def send(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, options: DispatchOptions) -> Received:
        """Dispatch this rank's part of a batch. Collective, and so is its backward.

        Args:
            x: ``[T, H]``.
            topk_idx: ``[T, K]``.
            topk_weights: ``[T, K]``, of any floating dtype.
            options: As for `ExpertGroup.dispatch`, with the layout EXPERTS.
        """
        sent = self.dispatch(options, x, topk_idx, topk_weights)
        offsets = sent.whole.expert_offsets
        assert isinstance(sent.rows, Tensor)
        assert sent.weights is not None
        assert offsets is not None
        return Received(sent.rows, sent.weights, offsets, sent.whole.plan)

    def bring_back(self, y: Tensor, plan: Plan) -> Tensor:
        """Return the sums of each token's rows in the whole batch, ``[T, H]``. Collective, and so is its backward."""
        return self.combine(plan, y, None)[0]

    def plain_dispatch(
        self, options: DispatchOptions, x: Tensor | Quantized, topk_idx: Tensor, topk_weights: Tensor | None
    ) -> Sent:
        """Send this rank's part of the batch."""
        assert isinstance(x, Tensor)
        assert topk_weights is not None
        part = self.sharers.part
        routing = Routing(part(topk_idx), part(topk_weights).float())
        sent = self.group.dispatch(part(x), routing, options=options)
        assert sent.topk_weights is not None
        return Sent(sent.x, sent.topk_weights.to(topk_weights.dtype), sent)

    def plain_redispatch(self, plan: Plan, x: Tensor | Quantized, topk_weights: Tensor | None) -> Sent:
        """Send this rank's part of the batch along a plan."""
        assert isinstance(x, Tensor)
        part = self.sharers.part
        weights = None if topk_weights is None else part(topk_weights).float()
        sent = self.group.redispatch(part(x), plan, topk_weights=weights)
        if topk_weights is None:
            return Sent(sent.x, None, sent)
        assert sent.topk_weights is not None
        return Sent(sent.x, sent.topk_weights.to(topk_weights.dtype), sent)

    def plain_combine(
        self, plan: Plan, y: Tensor, weights: Tensor | None, *biases: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Add up, and gather the parts of all ranks with this batch."""
        assert not biases
        as_sent = None if weights is None else weights.float().contiguous()
        sums = self.group.combine(y.contiguous(), plan, topk_weights=as_sent)
        x = self.sharers.whole(sums.x, self.num_tokens)
        if weights is None:
            return x, None
        assert sums.topk_weights is not None
        return x, self.sharers.whole(sums.topk_weights.to(weights.dtype), self.num_tokens)

    def for_weights(self) -> BatchExchange:
        """Return the exchange of a view that the group keeps."""
        return replace(self, group=for_weights(self.group))
