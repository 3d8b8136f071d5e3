"""`HybridEPBuffer` on CPU ranks: an expert that a token names more than once has the sum of its weights."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from support.deep_ep_hybrid_jobs import buffer_for
from tokenferry.compat.deep_ep.hybrid_ep_buffer import indices_to_map
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import same_bits
from tokenferry.testing.oracle import Sent

CASES = (
    Case((5, 3, 0, 7), experts=8, top_k=3, hidden=16, routing="repeated"),
    Case((4, 4), experts=2, top_k=6, hidden=8, routing="repeated", idx_dtype=torch.int32),
    Case((3, 2), experts=4, top_k=4, hidden=8, routing="all_to_expert_0"),
)


def slots(topk_idx: Tensor) -> Iterator[tuple[int, int, int]]:
    """Token, slot and expert of each slot that is used."""
    for token, row in enumerate(topk_idx.tolist()):
        for slot, expert in enumerate(row):
            if expert >= 0:
                yield token, slot, expert


def sums(one: Sent, experts: int) -> Tensor:
    """``[T, E]``: the sum of the weights of each expert, by plain loops."""
    found = torch.zeros(one.topk_idx.shape[0], experts, dtype=torch.float32, device="cpu")
    for token, slot, expert in slots(one.topk_idx):
        found[token, expert] += one.topk_weights[token, slot]
    return found


def repeated(rank: int, pg: Any, case: Case) -> None:
    buffer, sent, num_local = buffer_for(pg, case), case.inputs(), case.experts // case.ranks
    mine, tables = sent[rank], [sums(one, case.experts) for one in sent]
    rows = [(e, r, token) for r, one in enumerate(sent) for token, e in {(t, e) for t, _, e in slots(one.topk_idx)}]
    rows = sorted(row for row in rows if row[0] // num_local == rank)
    want = torch.tensor([tables[r][token, e] for e, r, token in rows], dtype=torch.float32, device="cpu")
    given = {"hidden": mine.x, "topk_idx": mine.topk_idx, "num_of_experts": case.experts}
    for budget in (None, 99):
        for weights, times in (({"topk_weights": mine.topk_weights}, 1), ({"probs": tables[rank] * 2}, 2)):
            x, probs, *_, handle = buffer.dispatch_with_permute(**given, **weights, num_permuted_tokens=budget)
            same_bits("probs", probs[: len(rows)], want * times)
            same_bits("hidden", x[: len(rows)], torch.cat([mine.x[:0], *(sent[r].x[t : t + 1] for _, r, t in rows)]))
            _, back = buffer.combine_with_unpermute(hidden=x, probs=probs, handle=handle)
            same_bits("combined probs", back, tables[rank] * times)
            again = buffer.dispatch_with_permute(hidden=mine.x, probs=tables[rank] * 4, handle=handle)[1]
            same_bits("cached probs", again[: len(rows)], want * 4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_repeated_expert_gets_one_row_with_the_sum_of_its_weights(worlds, case):
    worlds(case.ranks).run(repeated, case)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_a_map_of_repeated_choices_has_their_sums(dtype):
    weights = torch.tensor([[0.25, 0.75, 0.5], [0.5, 0.25, 4.0]], dtype=torch.float32, device="cpu").requires_grad_()
    index = torch.tensor([[0, 0, 2], [1, 1, -1]], dtype=dtype, device="cpu")
    chosen, probs = indices_to_map(index, weights, 2, 3)
    assert chosen.tolist() == [[True, False, True], [False, True, False]]
    assert probs.tolist() == [[1.0, 0.0, 0.5], [0.0, 0.75, 0.0]]
    (probs * torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float32, device="cpu")).sum().backward()
    assert weights.grad.tolist() == [[1.0, 1.0, 3.0], [2.0, 2.0, 0.0]]
