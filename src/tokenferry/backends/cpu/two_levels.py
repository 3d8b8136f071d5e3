"""`TwoLevels`: dispatch and combine of a group of several nodes; see `tokenferry.backends.cpu.levels`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tokenferry.backends.cpu import routing
from tokenferry.backends.cpu.exchange import Signature
from tokenferry.backends.cpu.levels import Levels, TransferOptions, TwoLevelTransfer, columns, distinct
from tokenferry.backends.cpu.payload import Outgoing, Payload
from tokenferry.backends.cpu.route import Addends, Arrived, consecutive_slices, tokens_by_rank
from tokenferry.transports.base import Deadline
from tokenferry.types import Plan


class TwoLevels:
    """A row crosses to each node once, and its rank there passes it on; see `Route`.

    Args:
        levels: Starts the exchanges of a call, which share one deadline.
    """

    def __init__(self, levels: Levels) -> None:
        self._levels = levels
        self._exchange = levels.exchange

    def dispatch(
        self, signature: Signature, payload: Payload, tokens: Sequence[Tensor], experts_per_rank: int
    ) -> contextlib.AbstractContextManager[Arrived]:
        """See `Route.dispatch`."""
        mine = list(self._levels.mine)

        def goes_to(_node: int, rows: Payload) -> Tensor:
            experts = rows.metadata()["topk_idx"].long()
            return routing.hits(experts, experts_per_rank, self._exchange.num_ranks)[:, mine]

        return self._move(signature, payload, tokens, goes_to, None)

    def redispatch(
        self, signature: Signature, payload: Payload, plan: Plan
    ) -> contextlib.AbstractContextManager[Arrived]:
        """See `Route.redispatch`."""
        relay = self._relay(plan)
        return self._move(signature, payload, tokens_by_rank(plan), lambda node, _rows: relay[node], plan)

    @contextlib.contextmanager
    def combine(self, signature: Signature, payload: Payload, plan: Plan, dtype: torch.dtype) -> Iterator[Addends]:
        """See `Route.combine`."""
        levels, deadline = self._levels, Deadline(self._exchange.timeout_s)
        total = self._sum_here(signature, payload, plan, dtype, deadline)
        tokens = [distinct(tokens_by_rank(plan), ranks) for ranks in levels.nodes]
        fields = {**signature.fields, **total.fields}
        counts = [len(goes_to) for goes_to in self._relay(plan)]
        rows = levels.by_rank(levels.rail, consecutive_slices(counts), slice(0, 0))  # a rail need not be ascending
        outgoing = Outgoing(total, rows, levels.by_rank(levels.rail, counts, 0))
        pending = levels.start_across(Signature(signature.kind, fields), outgoing, deadline)
        with pending.receive(deadline=deadline) as received:
            pending.check_counts(received, levels.by_rank(levels.rail, [each.numel() for each in tokens], 0))
            yield Addends(total, [received[rank] for rank in levels.rail], tokens)

    @contextlib.contextmanager
    def _move(
        self,
        signature: Signature,
        payload: Payload,
        tokens: Sequence[Tensor],
        goes_to: Callable[[int, Payload], Tensor],
        plan: Plan | None,
    ) -> Iterator[Arrived]:
        """Send each rank its rows; see `TwoLevelTransfer`. ``plan`` says how many rows come, if there is one."""
        deadline = Deadline(self._exchange.timeout_s)
        move = TwoLevelTransfer(self._levels, signature, payload, tokens, TransferOptions(), deadline)
        move.pass_on(goes_to, deadline)
        with move.receive(deadline, plan=plan) as arrived:
            yield Arrived(arrived, _joined([move.relay[node] for node in range(len(self._levels.nodes))]))

    def _sum_here(
        self, signature: Signature, payload: Payload, plan: Plan, dtype: torch.dtype, deadline: Deadline
    ) -> Payload:
        """Return, by node, the sums over the ranks of this node for the tokens that this rank has passed on."""
        levels, counts = self._levels, plan.src_counts.tolist()
        slices, mine = consecutive_slices(counts), levels.mine
        legs = {}
        for node in [*levels.others, levels.node]:
            sources = levels.nodes[node]
            rows = levels.by_rank(mine, [slices[src] for src in sources], slice(0, 0))
            outgoing = Outgoing(payload, rows, levels.by_rank(mine, [counts[src] for src in sources], 0))
            legs[node] = levels.start_here(signature, node, outgoing, deadline, copy_own=node != levels.node)
        sums: list[Tensor] = []
        weights: list[Tensor] = []
        for node, goes_to in enumerate(self._relay(plan)):
            tokens = columns(goes_to)
            with legs[node].receive(deadline=deadline) as received:
                here = [received[rank] for rank in mine]
                for rank, source, expected in zip(mine, here, tokens, strict=True):
                    legs[node].check_count(rank, source.num_rows, expected.numel())
                sums.append(self._sum(len(goes_to), dtype, tokens, [payload.view_rows(source) for source in here]))
                if payload.has("weights"):
                    of_rank = [payload.gather_metadata([source])["weights"] for source in here]
                    weights.append(self._sum(len(goes_to), torch.float32, tokens, of_rank))
        return Payload(torch.cat(sums), weights=torch.cat(weights) if weights else None)

    def _sum(self, num: int, dtype: torch.dtype, tokens: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
        """Return ``[num, width]``: for each token the sum of its rows of all sources, in source order."""
        out = torch.empty(num, rows[0].shape[1], dtype=dtype, device="cpu")
        routing.reduce_rows(out, tokens, rows, self._exchange.allocator)
        return out

    def _relay(self, plan: Plan) -> Sequence[Tensor]:
        """Return, by node, ``[rows, ranks a node]`` bool: which ranks of this node got each row passed on."""
        counts = torch.bincount(plan._places[:, 0], minlength=len(self._levels.nodes))
        return torch.split(plan._places[:, 1:] > 0, counts.tolist())


def _joined(relay: Sequence[Tensor]) -> Tensor:
    """Return ``Plan._places``: the nodes and the ranks of all rows that a rank passed on."""
    counts = torch.tensor([len(each) for each in relay], dtype=torch.int64, device="cpu")
    nodes = torch.repeat_interleave(torch.arange(len(relay), dtype=torch.int32, device="cpu"), counts)
    return torch.cat([nodes[:, None], torch.cat(list(relay)).int()], dim=1)
