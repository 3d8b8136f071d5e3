"""Normal mode: layout, dispatch, cached dispatch, combine, on four ranks."""

import pytest
import torch

from support import deep_ep_jobs as jobs
from tokenferry.testing.cases import Case
from tokenferry.testing.world import World


@pytest.mark.parametrize("case", jobs.CASES, ids=str)
def test_round_trip(worlds, case):
    worlds(4).run(jobs.round_trip, case)


@pytest.mark.parametrize("ranks", [1, 3])
def test_any_number_of_ranks(worlds, ranks):
    worlds(ranks).run(jobs.round_trip, Case((2, 3, 1)[:ranks], experts=6, top_k=2, hidden=16))


def test_more_ranks_than_deep_ep_has_in_a_node():
    """They are one node all the same, if they are on one host."""
    case = Case((2, 1, 0, 3, 1, 1, 2, 1, 2), experts=18, top_k=3, hidden=16)
    with World(case.ranks) as world:
        world.run(jobs.round_trip, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_rows_with_scales(worlds, dtype):
    worlds(4).run(jobs.scales, jobs.CASES[0], dtype)


@pytest.mark.parametrize("case", jobs.CASES[:2], ids=str)
def test_without_topk_idx(worlds, case):
    worlds(4).run(jobs.without_experts, case)


def test_ranks_that_is_token_in_rank_leaves_out(worlds):
    worlds(4).run(jobs.dropped_ranks, jobs.CASES[0])


@pytest.mark.parametrize("case", [jobs.CASES[0], jobs.CASES[1], jobs.CASES[4]], ids=str)
def test_num_worst_tokens(worlds, case):
    worlds(4).run(jobs.worst_tokens, case)


def test_too_few_worst_tokens(worlds):
    worlds(4).run(jobs.too_few_worst_tokens, jobs.CASES[0])


def test_each_direction_is_the_transpose_of_the_other(worlds):
    sums = worlds(4).run(jobs.backward, jobs.CASES[0])
    there, home = (sum(side) for side in zip(*sums, strict=True))
    assert there == pytest.approx(home, rel=1e-5)


def test_handles_are_not_consumed(worlds):
    worlds(4).run(jobs.in_a_batch)
