"""The kernels dispatch_layout and dispatch_restrict alone, on virtual ranks."""

import pytest
import torch

from support.virtual_ranks import POISON, Ranks, ranks_of
from tokenferry.kernels.control_block import MAX_EXPERTS
from tokenferry.kernels.dispatch_layout import spec as layout_spec
from tokenferry.kernels.dispatch_restrict import spec as restrict_spec

TOKENS = (129, 0, 1000, 1, 128, 127, 63, 257)
"""A unit has 128."""


def launch(ranks: Ranks, topk_idx: list[torch.Tensor], num_experts: int, blocks: int = 2, nodes: int = 0):
    """Return (counts, in_rank) of each rank."""
    R = ranks.num_ranks
    counts = [ranks.poisoned(R + num_experts + nodes, dtype=torch.int32) for _ in topk_idx]
    in_rank = [ranks.poisoned(len(index), R, dtype=torch.uint8) for index in topk_idx]
    fields = [
        {
            "topk_idx": ranks.on_device(index),
            "counts": counts[rank],
            "in_rank": in_rank[rank],
            "num_tokens": len(index),
            "top_k": index.shape[1],
            "num_experts": num_experts,
            "num_nodes": nodes,
        }
        for rank, index in enumerate(topk_idx)
    ]
    size = (blocks, layout_spec.THREADS, layout_spec.smem_bytes(num_experts, R))
    ranks.run(layout_spec.SPEC, fields, size, {"wide": int(topk_idx[0].dtype is torch.int64)})
    return [(counts[rank].cpu().tolist(), in_rank[rank].cpu().tolist()) for rank in range(R)]


def expected(topk_idx: torch.Tensor, num_experts: int, num_ranks: int, nodes: int = 0):
    """The same by plain loops."""
    per_rank, per_expert, per_node = [0] * num_ranks, [0] * num_experts, [0] * nodes
    in_rank = []
    for experts in topk_idx.tolist():
        distinct = {e for e in experts if 0 <= e < num_experts}
        ranks = {e // (num_experts // num_ranks) for e in distinct}
        for e in distinct:
            per_expert[e] += 1
        for rank in ranks:
            per_rank[rank] += 1
        for node in {rank * nodes // num_ranks for rank in ranks} if nodes else ():
            per_node[node] += 1
        in_rank.append([int(rank in ranks) for rank in range(num_ranks)])
    return per_rank + per_expert + per_node, in_rank


def test_the_worked_example():
    """The example in the head of the kernel."""
    found = launch(ranks_of(2), [torch.tensor([[0, 1], [1, 3]])] * 2, 4, nodes=2)
    assert found == [([2, 1, 1, 2, 0, 1, 2, 1], [[1, 0], [1, 1]])] * 2


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize(("num_ranks", "nodes"), [(1, 0), (2, 2), (3, 0), (8, 2), (8, 4)])
def test_any_routing(num_ranks, nodes, dtype):
    """Repeated experts, unused slots and bad indices; the next launch finds the counters at zero."""
    ranks, make = ranks_of(num_ranks), torch.Generator().manual_seed(num_ranks)
    for i, (local, top_k, blocks) in enumerate(((1, 1, 1), (3, 8, 2), (32, 7, 4), (2, 64, 3))):
        E = local * num_ranks
        drawn = [torch.randint(-2, E + 1, (TOKENS[(i + r) % 8], top_k), generator=make) for r in range(num_ranks)]
        topk_idx = [index.to(dtype) for index in drawn]
        found = launch(ranks, topk_idx, E, blocks, nodes)
        assert found == [expected(index, E, num_ranks, nodes) for index in topk_idx], (local, top_k, blocks)


def test_most_experts():
    topk_idx = [torch.arange(MAX_EXPERTS, dtype=torch.int64).view(64, 64)] * 2
    for counts, in_rank in launch(ranks_of(2), topk_idx, MAX_EXPERTS):
        assert counts == [32, 32] + [1] * MAX_EXPERTS
        assert in_rank == [[1, 0]] * 32 + [[0, 1]] * 32


def test_only_its_outputs_are_written():
    ranks = ranks_of(2)
    around = [ranks.poisoned(6, 2, dtype=torch.uint8) for _ in range(2)]
    counts = [ranks.poisoned(2 + 2 + 1, dtype=torch.int32) for _ in range(2)]
    before = [int(ranks.words(rank, "arrived")) for rank in range(2)]
    fields = [
        {
            "topk_idx": ranks.on_device(torch.tensor([[0], [1]])),
            "counts": counts[rank],
            "in_rank": around[rank][2:],
            "num_tokens": 2,
            "top_k": 1,
            "num_experts": 2,
            "num_nodes": 0,
        }
        for rank in range(2)
    ]
    ranks.run(layout_spec.SPEC, fields, (1, layout_spec.THREADS, layout_spec.smem_bytes(2, 2)), {"wide": 1})
    for rank in range(2):
        rows = around[rank].cpu()
        assert rows[2:4].tolist() == [[1, 0], [0, 1]]
        assert bool((rows[:2] == POISON).all())
        assert bool((rows[4:] == POISON).all())
        assert counts[rank].cpu()[:4].tolist() == [1, 1, 1, 1]
        assert bool((counts[rank].cpu()[4:].view(torch.uint8) == POISON).all())
        assert int(ranks.words(rank, "arrived")) == before[rank]


# ---------------------------------------------------------------------- dispatch_restrict


def restrict(ranks: Ranks, topk_idx: list[torch.Tensor], in_rank: list[torch.Tensor], num_experts: int, blocks: int):
    """Return the slots that are kept on each rank; checks that nothing is written behind them."""
    kept = [ranks.poisoned(len(index) + 1, index.shape[1], dtype=index.dtype) for index in topk_idx]
    fields = [
        {
            "topk_idx": ranks.on_device(index),
            "in_rank": ranks.on_device(in_rank[rank]),
            "kept": kept[rank],
            "num_tokens": len(index),
            "top_k": index.shape[1],
            "num_experts": num_experts,
        }
        for rank, index in enumerate(topk_idx)
    ]
    size = (blocks, restrict_spec.THREADS, 0)
    ranks.run(restrict_spec.SPEC, fields, size, {"wide": int(topk_idx[0].dtype is torch.int64)})
    for rows in kept:
        assert bool((rows[-1:].cpu().view(torch.uint8) == POISON).all())
    return [rows[:-1].cpu().tolist() for rows in kept]


def test_the_worked_example_of_restrict():
    """The example in the head of the kernel."""
    topk_idx, in_rank = torch.tensor([[0, 2], [3, -1]]), torch.tensor([[True, False], [False, True]])
    assert restrict(ranks_of(2), [topk_idx] * 2, [in_rank] * 2, 4, 1) == [[[0, -1], [3, -1]]] * 2


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_slots_of_ranks_that_are_left_out(num_ranks, dtype):
    ranks, make = ranks_of(num_ranks), torch.Generator().manual_seed(num_ranks)
    for i, (local, top_k, blocks) in enumerate(((1, 1, 1), (3, 8, 2), (32, 7, 4), (2, 64, 3))):
        E, tokens = local * num_ranks, [TOKENS[(i + r) % 8] for r in range(num_ranks)]
        topk_idx = [torch.randint(-2, E + 2, (T, top_k), generator=make).to(dtype) for T in tokens]
        in_rank = [torch.randint(0, 2, (T, num_ranks), generator=make).bool() for T in tokens]
        expected = [
            [
                [e if not 0 <= e < E or may_go[e // local] else -1 for e in experts]
                for experts, may_go in zip(index.tolist(), places.tolist(), strict=True)
            ]
            for index, places in zip(topk_idx, in_rank, strict=True)
        ]
        assert restrict(ranks, topk_idx, in_rank, E, blocks) == expected, (local, top_k, blocks)


def test_behind_an_aborted_call_nothing_is_restricted():
    ranks = ranks_of(1)
    ranks.words(0, "stopped").fill_(1)
    try:
        kept = restrict(ranks, [torch.tensor([[0]], dtype=torch.int64)], [torch.tensor([[True]])], 1, 1)
    finally:
        ranks.words(0, "stopped").zero_()
    assert kept == [[[int.from_bytes([POISON] * 8, "little", signed=True)]]]
