"""The kernel dispatch_expand alone: each row at all its experts, zeros in the padding if requested, nothing else."""

from dataclasses import dataclass

import pytest
import torch

from support.plan_checks import choices_of, form_for
from support.row_bytes import as_bytes, check_rows
from support.virtual_plan import Expected
from support.virtual_ranks import POISON, ranks_of, same_bytes
from tokenferry.kernels.dispatch_expand import spec as expand_spec
from tokenferry.testing.cases import Case

ROWS_MORE = 7
"""Places beyond those of a plan: there are some where counts stay on the device."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of a row and of its scales, and whether there are weights."""

    row_bytes: int
    scale_bytes: int = 0
    weights: bool = False


SIZES = (Sizes(16), Sizes(48, 4, True), Sizes(2000, 3), Sizes(7168, 224, True), Sizes(65536, 16), Sizes(1024, 10, True))
ROUTINGS = ("repeated", "even", "half_dropped", "one_token_all", "all_to_expert_0", "nothing")


def images(expected, rank, num_rows, sizes, make):
    """Return memory before (as dispatch leaves it: rows at their first places, all weights, else poison) and after."""
    parts = []
    for row_bytes in (sizes.row_bytes, sizes.scale_bytes):
        rows = torch.randint(256, (expected.num_received(rank), row_bytes), dtype=torch.uint8, generator=make)
        before = torch.full((num_rows, row_bytes), POISON, dtype=torch.uint8)
        after = before.clone()
        for row, (src, token) in enumerate(expected.received(rank)):
            before[expected.first_place(src, token, rank)] = rows[row]
            for e in expected.choices[src][token]:
                if e >= 0 and e // expected.num_local == rank:
                    after[expected.place(src, token, e)] = rows[row]
        parts.append((before, after))
    weights = torch.full((num_rows, 4), POISON, dtype=torch.uint8)
    for place in used(expected, rank):
        weights[place] = as_bytes(torch.tensor([float(place + 1)]))
    parts.append((weights, weights.clone()))
    return parts


def used(expected, rank):
    """Return the places that hold a row."""
    experts = range(rank * expected.num_local, (rank + 1) * expected.num_local)
    return {place for (_, _, e), place in expected.places.items() if e in experts}


def check(case, layout, sizes, zero, given):
    """Run on every rank; ``given``: from the exact number of rows to num_delivered."""
    ranks = ranks_of(case.ranks)
    topk_idx = [one.topk_idx for one in case.inputs()]
    expected = Expected(choices_of(topk_idx), case.experts, form_for(layout, choices_of(topk_idx), case.experts, 4))
    make = torch.Generator().manual_seed(case.seed)
    fields, blocks, wants = [], [], []
    for rank in range(case.ranks):
        exact = expected.num_delivered(rank)
        num_rows = exact + ROWS_MORE
        parts = images(expected, rank, num_rows, sizes, make)
        mine = [ranks.block(rank, num_rows * size) for size in (sizes.row_bytes, sizes.scale_bytes, 4)]
        for block, (before, _) in zip(mine, parts, strict=True):
            block.tensor.copy_(before.flatten())
        num_delivered = given(exact)
        if zero:
            for place in set(range(num_delivered or exact)) - used(expected, rank):
                for i, (_, after) in enumerate(parts):
                    if i < 2 or sizes.weights:
                        after[place] = 0
        blocks.append(mine)
        wants.append([after for _, after in parts])
        fields.append(
            {
                "rows": mine[0].address,
                "scale": mine[1].address if sizes.scale_bytes else 0,
                "weights": mine[2].address if sizes.weights else 0,
                "row_idx": ranks.on_device(expected.row_idx(rank)),
                "src_counts": ranks.on_device(torch.tensor(expected.src_counts(rank))),
                "expert_counts": ranks.on_device(torch.tensor(expected.expert_counts(rank), dtype=torch.int32)),
                "num_delivered": num_delivered,
                "row_bytes": sizes.row_bytes,
                "scale_bytes": sizes.scale_bytes,
                "top_k": case.top_k,
                "num_local": expected.num_local,
                "alignment": expected.form.alignment,
                "capacity": expected.form.capacity,
                "zero": int(zero),
                "num_sources": expected.num_sources,
            }
        )
    ranks.run(expand_spec.SPEC, fields, (2, expand_spec.THREADS, 0))
    for rank, (mine, want) in enumerate(zip(blocks, wants, strict=True)):
        for name, block, after in zip(("rows", "scale", "weights"), mine, want, strict=True):
            if after.numel():
                same_bytes(f"{case} {layout} {zero=} rank {rank} {name}", block.cpu(), after.flatten(), after.shape[1])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("layout", ["experts", "masked"])
def test_copies_and_zeros(num_ranks, layout, sizes):
    few = 12 if sizes.row_bytes > 10_000 else 60
    for i, routing in enumerate(ROUTINGS):
        num_local, top_k = ((5, 3), (9, 8), (4, 64))[i % 3]
        case = Case((few, 0, 7)[:num_ranks], num_local * num_ranks, top_k, routing=routing, seed=i)
        for zero in (False, True):
            check(case, layout, sizes, zero, lambda exact: exact)


@pytest.mark.parametrize("layout", ["experts", "masked"])
def test_zeros_reach_as_far_as_there_are_rows(layout):
    """Where counts stay on the device: up to num_delivered."""
    more = ROWS_MORE if layout == "experts" else 0
    for routing in ("half_dropped", "nothing"):
        check(Case((30, 11), 6, 3, routing=routing), layout, Sizes(256, 8, True), True, lambda exact: exact + more)


def test_zero_rows_given_means_up_to_the_end_of_the_last_expert():
    """The host does not know the number of rows yet: the kernel zeroes the padding of the last expert, too."""
    for routing in ("half_dropped", "repeated"):
        check(Case((30, 11), 6, 3, routing=routing), "experts", Sizes(256, 8, True), True, lambda exact: 0)


def test_an_aborted_plan_expands_nothing():
    ranks = ranks_of(2)
    blocks = [ranks.block(rank, 4096) for rank in range(2)]
    fields = [
        {
            "rows": blocks[rank].address,
            "row_idx": ranks.on_device(torch.tensor([[0, 1]])),
            "src_counts": ranks.on_device(torch.tensor([-1, -1])),
            "expert_counts": ranks.on_device(torch.zeros(2, dtype=torch.int32)),
            "num_delivered": 16,
            "row_bytes": 256,
            "top_k": 2,
            "num_local": 2,
            "alignment": 1,
            "zero": 1,
            "num_sources": ranks.num_ranks,
        }
        for rank in range(2)
    ]
    ranks.run(expand_spec.SPEC, fields, (1, expand_spec.THREADS, 0))
    for block in blocks:
        check_rows("an aborted plan", block, [], [], 256)
