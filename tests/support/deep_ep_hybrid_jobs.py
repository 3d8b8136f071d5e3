"""Jobs of the tests of `HybridEPBuffer`, against the oracle; ranks on the CPU run them, and threads on the emulator."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tokenferry.compat.deep_ep import HybridEPBuffer, hybrid_calls
from tokenferry.testing.cases import Case, answers, returned_weights
from tokenferry.testing.compare import same_bits
from tokenferry.testing.oracle import Oracle, Sent

CASES = (
    Case((5, 3, 0, 7), experts=8, top_k=3, hidden=16),
    Case((4, 4, 4, 4), experts=16, top_k=5, hidden=24, routing="half_dropped"),
    Case((3, 6, 2, 1), experts=12, top_k=5, hidden=8, routing="one_rank_idle", dtype=torch.float32),
    Case((2, 2, 2, 2), experts=8, top_k=2, hidden=16, routing="nothing"),
)


def in_order(one: Sent) -> Sent:
    """The same choices in ascending order, as those of a map are."""
    far = torch.where(one.topk_idx < 0, 1 << 20, one.topk_idx.long())
    index, order = far.sort(1)
    weights = one.topk_weights.gather(1, order)
    return Sent(one.x, index.masked_fill(index == 1 << 20, -1), weights)


def table(values: Tensor, topk_idx: Tensor, experts: int) -> Tensor:
    """``[T, E]`` with the values at the experts of their slots, by plain loops."""
    found = torch.zeros(topk_idx.shape[0], experts, dtype=values.dtype)
    for token, row in enumerate(topk_idx.tolist()):
        for slot, expert in enumerate(row):
            if expert >= 0:
                found[token, expert] = values[token, slot]
    return found


class Deal:
    """What each rank sends, and what is right for this rank in rows with an alignment."""

    def __init__(self, rank: int, case: Case, alignment: int) -> None:
        self.rank, self.case, self.alignment = rank, case, alignment
        self.sent = [in_order(one) for one in case.inputs()]
        self.mine = self.sent[rank]
        self.routing_map = table(
            torch.ones_like(self.mine.topk_idx, dtype=torch.bool), self.mine.topk_idx, case.experts
        )
        self.probs = table(self.mine.topk_weights, self.mine.topk_idx, case.experts)
        self.oracle = Oracle(self.sent, case.experts, "experts", alignment=alignment)
        self.rows = self.oracle.num_delivered(rank)
        self.padded = [-(-count // alignment) * alignment for count in self.oracle.expert_counts(rank)]

    def arguments(self) -> dict[str, Any]:
        return {"routing_map": self.routing_map, "probs": self.probs, "pad_multiple": self.alignment}


def buffer_for(pg: Any, case: Case) -> HybridEPBuffer:
    return HybridEPBuffer(
        group=pg,
        hidden_dim=case.hidden,
        max_num_of_tokens_per_rank=max(*case.tokens, 1),
        num_local_experts=case.experts // case.ranks,
        use_fp8=False,
        num_sms_dispatch_api=24,
        num_sms_combine_api=24,
    )


def round_trips(rank: int, pg: Any, case: Case) -> None:
    """Both directions and the cached dispatch, by map and by index, with and without a wait of the host."""
    buffer = buffer_for(pg, case)
    for alignment in (1, 4):
        deal = Deal(rank, case, alignment)
        most = max(deal.oracle.num_delivered(r) for r in range(case.ranks)) + alignment
        by_index = {
            "topk_idx": deal.mine.topk_idx,
            "topk_weights": deal.mine.topk_weights,
            "num_of_experts": case.experts,
            "pad_multiple": alignment,
        }
        for given in (deal.arguments(), by_index):
            check(buffer, deal, given, None)
            check(buffer, deal, given, most)


def check(buffer: HybridEPBuffer, deal: Deal, given: dict[str, Any], budget: int | None) -> None:
    case, rank, oracle = deal.case, deal.rank, deal.oracle
    places = [row.place for row in oracle.rows(rank)]
    how = {"num_permuted_tokens": budget, "non_blocking": budget is not None}
    x, probs, scale, counts, handle = buffer.dispatch_with_permute(
        hidden=deal.mine.x, num_of_experts_per_rank=case.experts // case.ranks, scaling_factor=None, **given, **how
    )
    assert x.shape[0] == (budget or deal.rows)
    assert scale is None
    assert (counts.dtype, counts.tolist()) == (torch.int64, deal.padded)
    assert (handle[-1] != 0).tolist() == [False]
    assert len(handle) == 11
    same_bits("hidden", x[places], oracle.x(rank))
    same_bits("probs", probs[places], oracle.weights(rank))
    pads = sorted(set(range(deal.rows)) - set(places))
    assert not x[pads].view(torch.uint8).any()
    assert not probs[pads].any()

    ys = [answers(case, oracle, r, budget or oracle.num_delivered(r), case.dtype) for r in range(case.ranks)]
    ws = [returned_weights(case, oracle, r, budget or oracle.num_delivered(r)) for r in range(case.ranks)]
    out, back = buffer.combine_with_unpermute(
        hidden=ys[rank], probs=ws[rank], handle=handle, pad_multiple=deal.alignment
    )
    same_bits("combined hidden", out, oracle.combine(rank, ys))
    same_bits("combined probs", back, table(oracle.combine_weights(rank, ws), deal.mine.topk_idx, case.experts))
    assert buffer.combine_with_unpermute(hidden=ys[rank], handle=handle, pad_multiple=deal.alignment)[1] is None

    again, none, _, same, _ = buffer.dispatch_with_permute(
        hidden=deal.mine.x * 2,
        handle=handle,
        pad_multiple=deal.alignment,
        num_permuted_tokens=counts.sum() if budget is None else budget,
    )
    assert none is None
    assert same.tolist() == deal.padded
    same_bits("cached hidden", again[places], oracle.x(rank, [one.x * 2 for one in deal.sent]))


def numbers_of_more_ranks(rank: int, pg: Any, case: Case) -> list[list[int]]:
    """Ranks tell each other numbers when there are more of them than a token may have choices on a GPU."""
    buffer = buffer_for(pg, case)
    with mock.patch.object(hybrid_calls, "MAX_CHOICES", 3):
        mine = torch.tensor([10 * rank, 10 * rank + 1, 7, 2**31 - 1 - rank, 0], dtype=torch.int32, device="cpu")
        return hybrid_calls._gathered(buffer._views, mine, hybrid_calls.COUNTS).tolist()


def overflows(rank: int, pg: Any, case: Case) -> None:
    """Rows behind the budget are dropped, their tokens miss them, and the ranks that have dropped some know it."""
    buffer = buffer_for(pg, case)
    deal = Deal(rank, case, 4)
    oracle = deal.oracle
    most = max(oracle.num_delivered(r) for r in range(case.ranks))
    for budget in (4, 4 * (most // 8), 4 * (most // 8) + 3, most):
        space = budget // 4 * 4
        x, probs, _, counts, handle = buffer.dispatch_with_permute(
            hidden=deal.mine.x, num_permuted_tokens=budget, non_blocking=True, **deal.arguments()
        )
        assert x.shape[0] == budget
        rows = oracle.rows(rank)
        assert handle[-1].item() == int(any(row.place >= space for row in rows))
        kept = [i for i, row in enumerate(rows) if row.place < space]
        places = [rows[i].place for i in kept]
        same_bits("hidden", x[places], oracle.x(rank)[kept])
        same_bits("probs", probs[places], oracle.weights(rank)[kept])
        firsts = oracle.expert_offsets(rank)
        assert counts.tolist() == [max(0, min(n, space - first)) for n, first in zip(deal.padded, firsts, strict=False)]
        y = torch.full((budget, case.hidden), torch.nan, dtype=torch.float32)
        y[places] = 1.0
        out, back = buffer.combine_with_unpermute(hidden=y, probs=probs, handle=handle, pad_multiple=4)
        arrived = torch.zeros(case.tokens[rank], case.experts, dtype=torch.bool)
        for r in range(case.ranks):
            for row in oracle.rows(r):
                if row.src_rank == rank and row.place < space:
                    arrived[row.src_token, r * len(counts) + row.expert] = True
        assert torch.equal(out, arrived.sum(1, keepdim=True).float().expand_as(out))
        same_bits("combined probs", back, deal.probs.masked_fill(~arrived, 0.0))


def scales(rank: int, pg: Any, case: Case) -> None:
    """FP8 rows with their scales."""
    buffer, deal = buffer_for(pg, case), Deal(rank, case, 4)
    data = [case.rows(r, torch.float32, 32, 1).to(torch.float8_e4m3fn) for r in range(case.ranks)]
    scale = [case.rows(r, torch.float32, 3, 2) for r in range(case.ranks)]
    x, probs, got, _, _ = buffer.dispatch_with_permute(
        hidden=data[rank], scaling_factor=scale[rank], use_fp8=True, routing_map=deal.routing_map, pad_multiple=4
    )
    places = [row.place for row in deal.oracle.rows(rank)]
    assert probs is None
    same_bits("hidden", x[places].view(torch.uint8), deal.oracle.x(rank, data).view(torch.uint8))
    same_bits("scales", got[places], deal.oracle.x(rank, scale))


def many_choices(rank: int, pg: Any, case: Case) -> int:
    """Tokens of rank 0 have three experts, where two are possible; returns the flag."""
    buffer = buffer_for(pg, case)
    routing_map = torch.zeros(2, case.experts, dtype=torch.bool)
    routing_map[:, : 3 - rank] = True
    x = torch.ones(2, case.hidden, dtype=torch.bfloat16)
    got, _, _, _, handle = buffer.dispatch_with_permute(hidden=x, routing_map=routing_map, num_permuted_tokens=16)
    out, _ = buffer.combine_with_unpermute(hidden=torch.ones_like(got), handle=handle)
    assert out[:, 0].tolist() == [2.0, 2.0]
    return int(handle[-1].item())
