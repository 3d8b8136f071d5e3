"""Every bad call raises before anything is sent, says what is wrong and what to do, and leaves the group usable."""

import pytest
import torch

from support.bad_calls import BAD, call_badly
from support.good_calls import SHAPE
from support.pairs import CUDA_PAIRS, NUM_GPUS, Pair
from tokenferry import BackendUnavailable, ExpertGroup, Routing, ShapeError


def test_the_table_is_long_enough():
    assert len(BAD) >= 40


def test_bad_calls_of_one_rank_leave_the_group_usable(worlds, pair):
    complaints = worlds(2, pair.backend).run(call_badly, pair, list(BAD))
    assert complaints == [[], []], "\n".join(complaint for rank in complaints for complaint in rank)


@pytest.mark.parametrize("name", ["x is too narrow", "an expert is too high", "y has too many rows"])
def test_bad_calls_of_all_ranks_leave_the_group_usable(worlds, pair, name):
    complaints = worlds(2, pair.backend).run(call_badly, pair, [name, name])
    assert complaints == [[], []]


def need_cuda(rank, pg) -> str:
    with pytest.raises(BackendUnavailable) as caught:
        ExpertGroup(pg, SHAPE, backend="cuda", timeout_s=30)
    return str(caught.value)


@pytest.mark.skipif(NUM_GPUS > 0, reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(worlds):
    for text in worlds(2).run(need_cuda):
        assert "backend='cuda'" in text
        assert "backend='cpu' or 'auto'" in text


def tensors_on_the_host(rank, pg, pair: Pair) -> None:
    with pair.open(pg, SHAPE) as group:
        x, routing = torch.ones(3, 16), Routing(torch.zeros(3, 2, dtype=torch.int64))
        where = f"on cpu; the group is on {group.device}: call .to"
        # Past the tests' own group, which would carry them over.
        with pytest.raises(ShapeError, match=f"x: .* {where}"):
            ExpertGroup.dispatch(group, x, routing)
        with pytest.raises(ShapeError, match=f"topk_idx: .* {where}"):
            ExpertGroup.dispatch(group, x.to(group.device), routing)


@pytest.mark.parametrize("pair", CUDA_PAIRS, ids=str)
def test_tensors_on_the_host(worlds, pair):
    worlds(2, pair.backend).run(tensors_on_the_host, pair)
