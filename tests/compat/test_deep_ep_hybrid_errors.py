"""Wrong calls of `HybridEPBuffer` on one of several ranks raise before anything is sent, also before numbers travel."""

import re
from typing import Any

import pytest
import torch

from support.deep_ep_hybrid_jobs import CASES, Deal, buffer_for
from tokenferry.errors import TokenferryError
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import same_bits

CASE = Case((5, 3), experts=4, top_k=2, hidden=16)
WRONG = {
    "rows of 24 bytes": r"ShapeError: .*: hidden: a row of 12 x torch\.bfloat16 is 24 bytes, expected a multiple of 16",
    "rows by column": r"ShapeError: .*: hidden: must be contiguous",
    "rows of another dtype, 9 bytes": r"ShapeError: .*: hidden: a row of 9 x torch\.int8 is 9 bytes",
    "sparse rows": r"ShapeError: .*: hidden: expected a .*, got torch\.sparse_coo",
    "negated rows": r"ShapeError: .*: hidden: .*resolve_neg\(\)",
    "sparse scales": r"ShapeError: .*: hidden, scaling_factor\[1\]: expected a dense tensor, got torch\.sparse_coo",
    "negated scales": r"ShapeError: .*: scaling_factor: .*resolve_neg\(\)",
    "an expert too many": "ConfigError: for_shape: num_experts=5 is not a multiple of the group's 2 ranks",
    "a huge multiple": "ArgumentError: .*: pad_multiple: expected an integer of at most 2147483647",
}


def change(name: str, x: torch.Tensor, case: Case) -> dict[str, Any]:
    scale = torch.ones(len(x), 2, dtype=torch.float32, device="cpu")
    odd = torch.zeros(len(x), case.experts + 1, dtype=torch.bool, device="cpu")
    return {
        "rows of 24 bytes": {"hidden": x[:, :12].contiguous()},
        "rows by column": {"hidden": x.t().contiguous().t()},
        "rows of another dtype, 9 bytes": {"hidden": x.char()[:, :9].contiguous()},
        "sparse rows": {"hidden": x.float().to_sparse()},
        "negated rows": {"hidden": torch._neg_view(x)},
        "sparse scales": {"scaling_factor": scale.to_sparse()},
        "negated scales": {"scaling_factor": torch._neg_view(scale)},
        "an expert too many": {"routing_map": odd, "probs": None},
        "a huge multiple": {"pad_multiple": 2**70},
    }[name]


def wrong_then_right(rank: int, pg: Any, name: str, budget: int | None) -> list[str]:
    """Ranks take turns: one makes a wrong call and then the right one, the other the right one only."""
    buffer, deal, said = buffer_for(pg, CASE), Deal(rank, CASE, 1), []
    right = {"hidden": deal.mine.x, **deal.arguments(), "num_permuted_tokens": budget}
    for turn in range(2):
        if turn == rank:
            try:
                buffer.dispatch_with_permute(**right | change(name, deal.mine.x, CASE))
            except TokenferryError as error:
                said.append(f"{type(error).__name__}: {error}")
        x, probs, *_ = buffer.dispatch_with_permute(**right)
        same_bits("hidden", x[: deal.rows], deal.oracle.x(rank))
        same_bits("probs", probs[: deal.rows], deal.oracle.weights(rank))
    return said


@pytest.mark.parametrize("budget", [None, 64])
@pytest.mark.parametrize("name", WRONG)
def test_a_corrected_call_goes_on(worlds, name, budget):
    for said in worlds(2).run(wrong_then_right, name, budget):
        assert len(said) == 1
        assert re.match(WRONG[name], said[0])


def odd_experts(rank: int, pg: Any, case: Case, budget: int | None) -> str:
    buffer = buffer_for(pg, case)
    x = torch.ones(2, case.hidden, dtype=torch.bfloat16, device="cpu")
    odd = torch.ones(2, 7, dtype=torch.bool, device="cpu")
    try:
        buffer.dispatch_with_permute(hidden=x, routing_map=odd, num_permuted_tokens=budget)
    except TokenferryError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@pytest.mark.parametrize("budget", [None, 64])
def test_experts_that_ranks_cannot_share_evenly(worlds, budget):
    """With a budget this was a bare error of torch about the shape of counts."""
    for said in worlds(4).run(odd_experts, CASES[0], budget):
        assert said.startswith("ConfigError: for_shape: num_experts=7 is not a multiple of the group's 4 ranks")
