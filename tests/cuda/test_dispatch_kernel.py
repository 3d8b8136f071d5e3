"""The kernel dispatch alone, on virtual ranks, along plans made by plain loops: every byte that it may touch."""

from __future__ import annotations

import pytest
import torch

from support.plan_checks import choices_of, form_for
from support.virtual_dispatch import Delivery, Payload, Scales
from support.virtual_plan import Expected, Form
from support.virtual_ranks import POISON, ranks_of
from tokenferry.kernels.control_block import RANK_SHIFT
from tokenferry.kernels.dispatch import spec as dispatch_spec
from tokenferry.testing.cases import Case

LAYOUTS = ("rows", "experts", "masked")


PAYLOADS = (
    Payload(16, weights=True),
    Payload(48, Scales(1, torch.float32), weights=True, idx_dtype=torch.int32),
    Payload(2000, Scales(3, torch.uint8, "columns"), first=False),
    Payload(7168, Scales(56, torch.float32), weights=True),
    Payload(7168, Scales(56, torch.int32, "columns"), idx_dtype=torch.int32),
    Payload(512, Scales(40, torch.float32, "wide"), weights=True, first=False),
    Payload(112, Scales(7, torch.bfloat16), blocks=3),
    Payload(8208, Scales(3, torch.float64, "columns"), weights=True),  # two pieces, the second one short
    Payload(14336, weights=True, first=False, blocks=4),
    Payload(65536, Scales(4, torch.float32), weights=True),
    Payload(64, Scales(16, torch.uint8), blocks=1),
    Payload(32, Scales(2048, torch.float32)),  # more scales than row
)


def deliver(num_ranks, case, layout, payload):
    topk_idx = [one.topk_idx for one in case.inputs()]
    expected = Expected(choices_of(topk_idx), case.experts, form_for(layout, choices_of(topk_idx), case.experts, 4))
    delivery = Delivery(ranks_of(num_ranks), expected, payload, topk_idx, seed=case.seed)
    delivery.run()
    delivery.check()
    return delivery


@pytest.mark.parametrize("payload", PAYLOADS, ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_every_kind_of_row(num_ranks, payload):
    """In every layout. More tokens than warps, so that rings wrap around; but few of the large rows."""
    i = PAYLOADS.index(payload)
    few = 20 if payload.row_bytes > 10_000 else 90
    tokens = (few, 0, 33, 1, 7, 2, 12, 5)[:num_ranks]
    routing = ("half_dropped", "even", "repeated")[i % 3]
    case = Case(tokens, num_ranks * (2, 3, 8)[i % 3], (3, 8, 4, 64)[i % 4], routing=routing, seed=i)
    for layout in LAYOUTS:
        deliver(num_ranks, case, layout, payload)


@pytest.mark.parametrize("num_ranks", [2, 5])
@pytest.mark.parametrize("routing", ["one_rank_idle", "all_to_expert_0", "nothing", "own_rank", "one_token_all"])
def test_uneven_routings(num_ranks, routing):
    case = Case((40, 3, 0, 17, 50)[:num_ranks], 2 * num_ranks, 4, routing=routing)
    for layout in LAYOUTS:
        deliver(num_ranks, case, layout, Payload(256, Scales(2, torch.float32), weights=True))


def test_no_rank_has_tokens():
    for layout in LAYOUTS:
        deliver(3, Case((0, 0, 0), 6, 2), layout, Payload(256, weights=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_units_than_the_rings_hold(layout):
    """One block has up to 24 warps with 3 buffers each; every ring wraps around many times."""
    deliver(2, Case((700, 301), 8, 2, routing="even"), layout, Payload(1024, Scales(4, torch.float32), True, blocks=1))


def test_one_plan_again_and_again():
    """Handshakes alternate between two halves: ten calls along one plan, other sizes, a late rank each time."""
    ranks = ranks_of(3)
    case = Case((31, 4, 18), 6, 3, routing="repeated")
    topk_idx = [one.topk_idx for one in case.inputs()]
    expected = Expected(choices_of(topk_idx), 6, Form("experts", alignment=2))
    for i in range(10):
        ranks.reset()
        payload = Payload((16, 2048, 9000 // 16 * 16)[i % 3], weights=i % 2 == 0, first=i % 4 == 0)
        delivery = Delivery(ranks, expected, payload, topk_idx, seed=i)
        ranks.delay(i % 3, 1)
        delivery.run()
        delivery.check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_rank_acts_for_several_sources(num_ranks, layout):
    """One launch for each segment of a plan; the tokens of the other sources keep their own numbers."""
    tokens = (40, 0, 33, 1, 7, 2, 12, 5, 90)[: 3 * num_ranks]
    case = Case(tokens, 3 * num_ranks * 2, 4, routing="repeated", seed=num_ranks)
    topk_idx = [one.topk_idx % (2 * num_ranks) for one in case.inputs()]
    free = Expected(choices_of(topk_idx), 2 * num_ranks, Form(layout, alignment=4), segments=3)
    capacity = max(max(free.expert_counts(rank)) for rank in range(num_ranks)) if layout == "masked" else 0
    expected = Expected(choices_of(topk_idx), 2 * num_ranks, Form(layout, 4, capacity), segments=3)
    delivery = Delivery(
        ranks_of(num_ranks), expected, Payload(64, Scales(3, torch.float32), weights=True), topk_idx, seed=1
    )
    delivery.run()
    delivery.check()


def test_an_aborted_plan_moves_nothing():
    """After an aborted call the counts are -1 on all ranks: kernels no-op, nothing is written."""
    ranks = ranks_of(2)
    topk_idx = [one.topk_idx for one in Case((9, 5), 4, 2).inputs()]
    expected = Expected(choices_of(topk_idx), 4, Form("experts"))
    delivery = Delivery(ranks, expected, Payload(64, weights=True), topk_idx)
    epochs, void = ranks.epochs(), ranks.on_device(torch.tensor([-1, -1]))
    fields = [delivery.fields(rank, rows_out=void, rows_in=void) for rank in range(2)]
    ranks.run(dispatch_spec.SPEC, fields, delivery.sizes())
    assert ranks.epochs() == epochs
    for landed in delivery.landed:
        for block in landed.blocks():
            assert block is None or (block.cpu() == POISON).all()


def test_places_of_the_highest_rank_fit_into_an_int32():
    assert 7 << RANK_SHIFT | (1 << RANK_SHIFT) - 1 == (1 << 31) - 1
