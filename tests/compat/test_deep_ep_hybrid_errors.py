"""Wrong calls of `HybridEPBuffer` on one of several ranks raise before anything is sent, also before numbers travel."""

import re
from typing import Any

import pytest
import torch

from support.deep_ep_hybrid_jobs import CASES, Deal, buffer_for
from tokenferry.compat.deep_ep import HybridEPBuffer, hybrid_calls
from tokenferry.errors import ArgumentError, ShapeError, TokenferryError
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import same_bits

CASE = Case((5, 3), experts=4, top_k=2, hidden=16)
WRONG = {
    "rows of 24 bytes": r"ShapeError: .*: hidden: a row of 12 x torch\.bfloat16 is 24 bytes, expected a multiple of 16",
    "rows by column": r"ShapeError: .*: hidden: must be contiguous",
    "rows of another dtype, 9 bytes": r"ShapeError: .*: hidden: a row of 9 x torch\.int8 is 9 bytes",
    "sparse rows": r"ShapeError: .*: hidden: expected a .*, got torch\.sparse_coo",
    "negated rows": r"ShapeError: .*: hidden: .*resolve_neg\(\)",
    "sparse scales": r"ShapeError: .*: scaling_factor: expected a dense tensor, got torch\.sparse_coo",
    "a pair": r"ShapeError: .*: hidden: expected a tensor \[T, H\], got a tuple; pass scales as scaling_factor",
    "a pair without scales": r"ShapeError: .*: hidden: expected a tensor \[T, H\], got a tuple",
    "negated scales": r"ShapeError: .*: scaling_factor: .*resolve_neg\(\)",
    "an expert too many": "ConfigError: .*: num_of_experts=5 is not a multiple of the group's 2 ranks",
    "a huge multiple": "ArgumentError: .*: pad_multiple: expected an integer of at most 2147483647",
    "a multiple that counts cannot hold": "ArgumentError: .*: pad_multiple: expected at most 1073741824, .* 2 experts",
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
        "a pair": {"hidden": (x, scale)},
        "a pair without scales": {"hidden": (x, None)},
        "negated scales": {"scaling_factor": torch._neg_view(scale)},
        "an expert too many": {"routing_map": odd, "probs": None},
        "a huge multiple": {"pad_multiple": 2**70},
        "a multiple that counts cannot hold": {"pad_multiple": 2**31 - 1},
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
        assert "dispatch_with_permute: num_of_experts=7 is not a multiple of the group's 4 ranks" in said


def test_probabilities_of_vmap_are_refused_before_numbers_are_sent(monkeypatch):
    """They are sent behind numbers, which other ranks would take for those of the corrected call."""
    monkeypatch.setattr(hybrid_calls, "_gathered", None)
    buffer = HybridEPBuffer(None, 16, 4, 4)
    x, chosen = torch.ones(2, 16, device="cpu"), torch.ones(2, 4, dtype=torch.bool, device="cpu")
    with pytest.raises(ShapeError, match=r"dispatch_with_permute: probs: .* torch\.vmap"):
        torch.func.vmap(lambda probs: buffer.dispatch_with_permute(hidden=x, routing_map=chosen, probs=probs))(
            torch.ones(3, 2, 4, device="cpu")
        )


@pytest.mark.parametrize("name", ["topk_idx", "topk_weights"])
def test_what_a_map_replaces_is_checked_all_the_same(name):
    buffer = HybridEPBuffer(None, 16, 4, 4)
    x, chosen = torch.ones(2, 16, device="cpu"), torch.ones(2, 4, dtype=torch.bool, device="cpu")
    given = {"hidden": x, "routing_map": chosen, "probs": chosen.float()}
    with pytest.raises(ShapeError, match=f"{name}: expected .* got str"):
        buffer.dispatch_with_permute(**given, **{name: "x"})
    buffer.dispatch_with_permute(**given, topk_idx=chosen.int(), topk_weights=chosen.float())


def again(**wrong: Any) -> None:
    """Make a dispatch, and another one with its handle and a wrong argument."""
    buffer = HybridEPBuffer(None, 16, 4, 4)
    x, chosen = torch.ones(2, 16, device="cpu"), torch.ones(2, 4, dtype=torch.bool, device="cpu")
    handle = buffer.dispatch_with_permute(hidden=x, routing_map=chosen)[4]
    buffer.dispatch_with_permute(hidden=x, handle=handle, num_permuted_tokens=torch.tensor([8], device="cpu"))
    buffer.dispatch_with_permute(**{"hidden": x, "handle": handle, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"non_blocking": "x"}, "non_blocking: expected True or False"),
        (
            {"num_permuted_tokens": torch.tensor([8.5], device="cpu")},
            r"num_permuted_tokens: expected None or 8, .*8\.5",
        ),
        ({"num_permuted_tokens": torch.tensor([True], device="cpu")}, "num_permuted_tokens: expected None or 8"),
        ({"hidden": (torch.ones(2, 16, device="cpu"), None)}, "hidden: expected a tensor .* pass scales as scaling_"),
    ],
)
def test_a_cached_dispatch_refuses(wrong, message):
    with pytest.raises(ArgumentError, match=message):
        again(**wrong)
