"""Errors have the words of DeepEP's API: its methods, its arguments, and their values, also where ranks disagree."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.deep_ep_jobs import on_nodes
from tokenferry.compat.deep_ep import Buffer, ElasticBuffer, EPBuffer, HybridEPBuffer
from tokenferry.errors import ClosedError, ConfigError, MismatchError, ShapeError, TokenferryError
from tokenferry.testing.world import World

T, K, E, H, M = 2, 2, 4, 128, 4
X = torch.ones(T, H, dtype=torch.bfloat16, device="cpu")
INDEX = torch.tensor([[0, 2], [1, 3]], dtype=torch.int64, device="cpu")
WEIGHTS = torch.ones(T, K, dtype=torch.float32, device="cpu")
MAP = torch.zeros(T, E, dtype=torch.bool, device="cpu").scatter(1, INDEX, True)
DIFFER = "rank 0 and rank 1 made different calls: "


def v1(buffer: Buffer, index: torch.Tensor = INDEX, num_experts: int = E, **other: Any) -> Any:
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(index, num_experts)
    layout = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    given = {"x": X, "topk_idx": index, "topk_weights": WEIGHTS, "num_tokens_per_rdma_rank": per_node, **layout}
    return buffer.dispatch(**given | other)


BARE: dict[str, Any] = {"topk_idx": None, "topk_weights": None}


def elastic(buffer: ElasticBuffer | EPBuffer, **other: Any) -> Any:
    return buffer.dispatch(**{"x": X, "topk_idx": INDEX, "num_experts": E} | other)


def low_latency(buffer: Buffer, **other: Any) -> Any:
    return buffer.low_latency_dispatch(X, INDEX, M, E, **other)


def low_latency_combine(buffer: Buffer, **other: Any) -> Any:
    rows, _, handle, _, _ = low_latency(buffer, use_fp8=False)
    return buffer.low_latency_combine(rows, INDEX, WEIGHTS, handle, **other)


def hybrid(buffer: HybridEPBuffer, **other: Any) -> Any:
    return buffer.dispatch_with_permute(**{"hidden": X, "routing_map": MAP} | other)


def again(call: Callable) -> Callable:
    """Return the call, and then another one with the handle of the first."""
    return lambda b: b.dispatch(X, handle=call(b)[4 if isinstance(b, Buffer) else 3])


def twice(call: Callable) -> Callable:
    return lambda b: (call(b), call(b))


MAKERS: dict[str, Callable] = {
    "V1": lambda pg: Buffer(pg),
    "low latency": lambda pg: Buffer(pg, low_latency_mode=True),
    "shrinking": lambda pg: Buffer(pg, low_latency_mode=True, enable_shrink=True),
    "V2": lambda pg: ElasticBuffer(pg, num_max_tokens_per_rank=M),
    "V2.5": lambda pg: EPBuffer(pg, num_max_tokens_per_rank=M),
    "hybrid": lambda pg: HybridEPBuffer(pg, H, M, E // 2),
}
TOPK: dict[str, Any] = {"routing_map": None, "topk_idx": INDEX, "num_of_experts": E}
DISPATCH, EXPERTS = "HybridEPBuffer.dispatch_with_permute", " is 4 on rank 0 and 2 on rank 1, "
BY_MAP = "or rank 1 passed routing_map without num_permuted_tokens, or rank 1 passed num_permuted_tokens"
NO_TOPK = "or rank 1 passed no topk_idx; it has to"
MISMATCHES: list[tuple[str, Callable, Callable, str, str]] = [
    ("V1", v1, lambda b: v1(b, **BARE), f"Buffer.dispatch #1: {DIFFER}num_experts{EXPERTS}{NO_TOPK}", ""),
    (
        "V1",
        lambda b: v1(b, INDEX[:, :1].contiguous(), 2, topk_weights=None),
        lambda b: v1(b, **BARE),
        f"the number of columns of topk_idx is 1 on rank 0 and 2 on rank 1, {NO_TOPK}",
        "",
    ),
    ("V1", lambda b: v1(b, **BARE), v1, f"{DIFFER}rank 0 passed no topk_idx, and rank 1 did not; call the same", ""),
    (
        "V1",
        lambda b: v1(b, **BARE),
        lambda b: v1(b, **BARE, num_tokens_per_expert=torch.ones(12, dtype=torch.int32, device="cpu")),
        f"Buffer.dispatch #2: {DIFFER}the length of num_tokens_per_expert differs; it has to be the same",
        "",
    ),
    ("V1", v1, lambda b: v1(b, topk_weights=None), "bytes in a row of topk_weights is 8 on rank 0 and 0 on rank 1", ""),
    ("V1", v1, lambda b: v1(b, x=(X, WEIGHTS)), r"bytes in a row of x\[1\] is 0 on rank 0 and 8 on rank 1", ""),
    ("V1", v1, lambda b: v1(b, x=X.half()), "the dtype of x is torch.bfloat16 on rank 0 and torch.float16 on", ""),
    ("V1", twice(v1), again(v1), "#2: .*: rank 1 called Buffer.dispatch with a handle; call the same", ""),
    ("V1", twice(v1), lambda b: b.combine(*v1(b)[::4]), "#2: .*: rank 1 called Buffer.combine; call", ""),
    ("V1", again(v1), twice(v1), "Buffer.dispatch #2: .*: rank 1 called Buffer.dispatch; call", ""),
    (
        "low latency",
        low_latency,
        lambda b: low_latency(b, round_scale=True),
        "Buffer.low_latency_dispatch #1: .*: the format is use_fp8=True on rank 0 and use_fp8=True, round_scale=True",
        "",
    ),
    (
        "low latency",
        low_latency_combine,
        lambda b: low_latency_combine(b, use_logfmt=True),
        "Buffer.low_latency_combine #2: .*: use_logfmt is False on rank 0 and True on rank 1",
        "",
    ),
    (
        "shrinking",
        lambda b: low_latency(b, use_fp8=False),
        lambda b: b.clean_low_latency_buffer(M, H, E),
        "num_experts is 4 on rank 0 and 2 on rank 1, or rank 1 called Buffer.clean_low_latency_buffer; it has to",
        "Buffer.clean_low_latency_buffer #1: .*: rank 1 called Buffer.clean_low_latency_buffer, and rank 0 did not",
    ),
    (
        "V2",
        elastic,
        lambda b: elastic(b, do_expand=True),
        "do_expand is False on rank 0 and True on rank 1; it has",
        "",
    ),
    (
        "V2.5",
        elastic,
        lambda b: elastic(b, do_cpu_sync=False),
        "EPBuffer.* do_cpu_sync is True on rank 0 and False",
        "",
    ),
    (
        "V2",
        elastic,
        lambda b: elastic(b, num_max_tokens_per_rank=9),
        "num_max_tokens_per_rank is 4 on rank 0 and 9",
        "",
    ),
    (
        "V2",
        elastic,
        lambda b: b.barrier(),
        "num_experts is 4 on rank 0 and 2 on rank 1, or rank 1 called ElasticBuffer.barrier; it has to",
        "ElasticBuffer.barrier #1: .*: rank 1 called ElasticBuffer.barrier, and rank 0 did not; call the same",
    ),
    (
        "V2.5",
        lambda b: b.combine(*elastic(b)[::3]),
        lambda b: (elastic(b), b.barrier()),
        "EPBuffer.combine #2: .*: rank 1 called EPBuffer.dispatch or EPBuffer.barrier; call the same",
        "EPBuffer.barrier #2: .*: rank 0 called EPBuffer.combine; call the same",
    ),
    (
        "hybrid",
        lambda b: hybrid(b, **TOPK),
        hybrid,
        f"{DISPATCH} #1: {DIFFER}num_of_experts{EXPERTS}{BY_MAP}",
        "rank 1 passed routing_map without num_permuted_tokens, and rank 0 did not; call the same",
    ),
    ("hybrid", hybrid, lambda b: hybrid(b, num_permuted_tokens=8), "whether num_permuted_tokens is given differs", ""),
    (
        "hybrid",
        lambda b: hybrid(b, num_permuted_tokens=8),
        lambda b: hybrid(b, num_permuted_tokens=9),
        "num_permuted_tokens is 8 on rank 0 and 9 on rank 1",
        "",
    ),
    (
        "hybrid",
        lambda b: hybrid(b, num_permuted_tokens=8),
        lambda b: hybrid(b, num_permuted_tokens=8, routing_map=MAP.repeat(1, 2)),
        "the number of experts differs",
        "",
    ),
    ("hybrid", hybrid, lambda b: hybrid(b, pad_multiple=4), "pad_multiple is 1 on rank 0 and 4 on rank 1", ""),
]
"""A kind of buffer, the calls of two ranks, and what each must report; where nothing is said of rank 1: the same."""


CASES = {
    "x: columns": ("V1", lambda b: v1(b, x=X[:, :0]), ShapeError, "Buffer.dispatch: x: expected at least one column"),
    "topk_idx: columns": (
        "low latency",
        lambda b: b.low_latency_dispatch(X, INDEX[:, :0], M, E),
        ShapeError,
        "Buffer.low_latency_dispatch: topk_idx: expected at least one column, got none",
    ),
    "hidden: columns": ("hybrid", lambda b: hybrid(b, hidden=X[:, :0]), ShapeError, f"{DISPATCH}: hidden: expected at"),
    "experts": ("hybrid", lambda b: hybrid(b, routing_map=MAP[:, :0]), ConfigError, f"{DISPATCH}: num_of_experts: exp"),
    "num_experts": (
        "V1",
        lambda b: b.get_dispatch_layout(INDEX, 2.0),
        ConfigError,
        "Buffer.get_dispatch_layout: num_experts: expected a positive integer, got 2.0",
    ),
    "no experts": (
        "V1",
        lambda b: v1(b, num_tokens_per_expert=INDEX[:0, 0]),
        ConfigError,
        "Buffer.dispatch: num_tokens_per_expert: E: expected a positive integer, got 0",
    ),
    "x[1]": (
        "V1",
        lambda b: v1(b, x=(X, WEIGHTS[:1])),
        ShapeError,
        r"Buffer.dispatch: x\[1\]: expected .*; T=2 was set by x, here it is 1",
    ),
    "x of int8": ("V1", lambda b: v1(b, x=X[:, :9].char()), ShapeError, "Buffer.dispatch: x: a row of 9 x torch.int8"),
    "topk_weights": ("V1", lambda b: v1(b, topk_weights=WEIGHTS[:, :1]), ShapeError, "K=2 was set by topk_idx, here"),
    "combine: x": ("V1", lambda b: b.combine(X.int(), v1(b)[4]), ShapeError, "Buffer.combine: x: expected .*int32"),
    "combine: bias": (
        "V1",
        lambda b: b.combine(X, v1(b)[4], bias=X.int()),
        ShapeError,
        "Buffer.combine: bias: expected torch.bfloat16",
    ),
    "combine: weights": (
        "V1",
        lambda b: b.combine(X, v1(b, **BARE)[4], WEIGHTS),
        ShapeError,
        "topk_weights: .*; K=1 was set by the handle, whose dispatch had no topk_idx, so that there is a slot for each",
    ),
    "handle": (
        "V1",
        lambda b: b.combine(X, v1(Buffer(None))[4]),
        TokenferryError,
        "Buffer.combine: handle: it was made by group .*; use the buffer that dispatched",
    ),
    "low_latency_combine: weights": (
        "low latency",
        lambda b: b.low_latency_combine(*rows_of(b), torch._neg_view(WEIGHTS), low_latency(b, use_fp8=False)[2]),
        ShapeError,
        "Buffer.low_latency_combine: topk_weights: expected a tensor whose memory",
    ),
    "counters": (
        "low latency",
        lambda b: low_latency(b, cumulative_local_expert_recv_stats=torch._neg_view(INDEX.view(-1).int())),
        ShapeError,
        "Buffer.low_latency_dispatch: cumulative_local_expert_recv_stats: expected a tensor whose memory",
    ),
    "a hook": (
        "low latency",
        lambda b: b.low_latency_combine(
            rows_of(b)[0], INDEX, WEIGHTS, low_latency(b, use_fp8=False, return_recv_hook=True)[2]
        ),
        TokenferryError,
        "Buffer.low_latency_combine: handle: its rows have not been received; call the hook of its dispatch first",
    ),
    "rank_to_mask": (
        "shrinking",
        lambda b: b.low_latency_update_mask_buffer(5, True),
        TokenferryError,
        "Buffer.low_latency_update_mask_buffer: rank_to_mask: expected another rank",
    ),
    "a row of x": ("V2", lambda b: b.combine(X[:, :7].contiguous(), elastic(b)[3]), ShapeError, "combine: x: a row of"),
    "hidden": (
        "hybrid",
        lambda b: b.combine_with_unpermute(hidden=torch.ones(4, 7, device="cpu"), handle=hybrid(b)[4]),
        ShapeError,
        "HybridEPBuffer.combine_with_unpermute: hidden: a row of 7",
    ),
    **{
        f"{kind}: group": (kind, lambda b, make=make: make("g"), ConfigError, r"^\w*Buffer: group: expected a torch")
        for kind, make in MAKERS.items()
    },
}
"""A kind of buffer, a call of a group of one rank, and what it raises."""


def rows_of(buffer: Buffer) -> tuple[torch.Tensor, torch.Tensor]:
    return low_latency(buffer, use_fp8=False)[0], INDEX


@pytest.mark.parametrize("name", CASES)
def test_an_error_names_the_method_and_its_argument(name):
    kind, call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call(MAKERS[kind](None))


def test_hooks_and_closed_buffers_have_the_same_words():
    buffer = Buffer(None, low_latency_mode=True, explicitly_destroy=True)
    hook = low_latency(buffer, return_recv_hook=True)[4]
    buffer.destroy()
    with pytest.raises(ClosedError, match=r"^Buffer.low_latency_dispatch: the group .*; make a new buffer"):
        hook()


def shrinks(rank: int, pg: Any) -> str:
    with pytest.raises(ConfigError) as said:
        Buffer(pg, low_latency_mode=True, enable_shrink=rank == 0)
    return str(said.value)


def test_ranks_that_disagree_about_enable_shrink(worlds):
    for said in worlds(2).run(shrinks):
        assert said.startswith("Buffer: enable_shrink differs between ranks (rank 0: True, rank 1: False); give all")


def other_dialects(rank: int, pg: Any) -> str:
    kind, call = (("V2", elastic), ("low latency", low_latency))[rank]
    buffer = MAKERS[kind](pg)
    with pytest.raises(MismatchError) as said:
        call(buffer)
    return str(said.value)


def test_ranks_that_speak_different_dialects(worlds):
    first, second = worlds(2).run(other_dialects)
    assert first.startswith(f"ElasticBuffer.dispatch #1: {DIFFER}rank 1 called decode_dispatch; call the same")
    assert "rank 0 called Buffer.dispatch; call the same" in second


def reported_across(rank: int, pg: Any) -> str:
    buffer = MAKERS["V2"](pg)
    with pytest.raises(MismatchError) as said:
        elastic(buffer, do_expand=rank == 1)
    return str(said.value)


def test_ranks_of_several_nodes_quote_each_other_in_the_same_words():
    with World(4) as world:  # whose process group ends with the buffer
        for said in world.run(on_nodes, 2, reported_across):
            assert re.search(r"ElasticBuffer.dispatch.*do_expand is (True|False) on rank", said), said
            assert not re.search(r"(?<![.\w])dispatch #|layout is", said), said


def reported(rank: int, pg: Any, number: int) -> list[str]:
    """Make the call of this rank; return what it raises, and what the next call does."""
    kind, *calls = MISMATCHES[number][:3]
    buffer = MAKERS[kind](pg)
    with pytest.raises(MismatchError) as first:
        calls[rank](buffer)
    with pytest.raises(ClosedError) as second:
        calls[rank](buffer)
    return [str(first.value), str(second.value)]


@pytest.mark.parametrize("number", range(len(MISMATCHES)))
def test_a_mismatch_names_arguments_and_methods_of_deep_ep(worlds, number):
    said = worlds(2).run(reported, number)
    for (first, second), wanted in zip(said, MISMATCHES[number][3:], strict=True):
        # Without an expectation of its own, the other rank says the same from its side.
        assert re.search(wanted, first), first
        for text in (first, second):
            assert not re.search(
                r"(?<![.\w])(re)?dispatch #|ExpertGroup|top_k|max_tokens is|device counts|layout is", text
            )
