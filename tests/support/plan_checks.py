"""Checks of dispatch plans that the kernels made on virtual ranks."""

import torch

from support.virtual_plan import Expected, Form
from support.virtual_ranks import POISON
from tokenferry.kernels.codes import UNIT_TOKENS
from tokenferry.testing.compare import same_bits


def choices_of(topk_idx):
    return [one.tolist() for one in topk_idx]


def form_for(layout, choices, num_experts, alignment=1, segments=1):
    """Return a form in which every row has a place; masked: with just the capacity that the fullest expert needs."""
    if layout != "masked":
        return Form(layout, alignment if layout == "experts" else 1)
    return Form("masked", capacity=max(1, *Expected(choices, num_experts, Form("masked", capacity=1), segments).ends))


def check(planner, expected, what=""):
    """Check every word that both kernels write, on every rank."""
    for rank in range(planner.ranks.num_ranks):
        check_counts(planner, expected, rank, f"{what} rank {rank}")
        t = planner.tables[rank]
        places = torch.cat([expected.table(src) for src in expected.sources(rank)])
        if places.numel():
            same_bits(f"{what} rank {rank} places", t.places, places)
        first = [i * planner.segment_units * UNIT_TOKENS for i in range(planner.segments)]
        sent = list(zip(first, (expected.sent[src] for src in expected.sources(rank)), strict=True))
        tokens = [at + token for to in range(expected.num_ranks) for at, there in sent for token in there[to]]
        flat = torch.full(t.dst_token.shape, int.from_bytes(bytes([POISON]) * 8, "little", signed=True))
        flat[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        same_bits(f"{what} rank {rank} dst_token", t.dst_token, flat)


def check_counts(planner, expected, rank, what):
    t = planner.tables[rank]
    same_bits(f"{what} dst_counts", t.dst_counts, torch.tensor(expected.dst_counts(rank)))
    same_bits(f"{what} src_counts", t.src_counts, torch.tensor(expected.src_counts(rank)))
    same_bits(f"{what} expert_counts", t.expert_counts, torch.tensor(expected.expert_counts(rank), dtype=torch.int32))
    if expected.form.layout == "experts":
        first = rank * expected.num_local
        offsets = [*expected.starts[first : first + expected.num_local], expected.ends[rank]]
        same_bits(f"{what} expert_offsets", t.expert_offsets, torch.tensor(offsets, dtype=torch.int32))
    unused = [-1] * (8 - expected.num_ranks)
    by_segment = [
        torch.tensor(counts).view(-1, expected.num_ranks).sum(0).tolist()
        for counts in (expected.src_counts(rank), expected.dst_counts(rank))
    ]
    host = [planner.ranks.call, *by_segment[0], *unused, *by_segment[1], *unused]
    host += [max(expected.ends), planner.longest]
    assert t.host.tolist() == [*host, *expected.expert_counts(rank)], f"{what} host words"
