"""Every bad call raises before anything is sent, says what is wrong and what to do, and leaves the group usable."""

import pytest
import torch

from support.bad_calls import BAD
from support.good_calls import SHAPE, good
from support.pairs import CUDA_PAIRS, NUM_GPUS, Pair
from tokenferry import BackendUnavailable, ExpertGroup, Routing, ShapeError


def call_badly(rank, pg, pair: Pair, names: list[str]) -> list[str]:
    """Ranks take turns to make a bad call; after each, both make a round trip together."""
    complaints = []
    with pair.open(pg, SHAPE) as group, pair.open(pg, SHAPE) as stranger:
        g = good(pg, group, stranger)
        for i, name in enumerate(names):
            call, kind, words = BAD[name]
            if rank == i % 2:
                words = [word.replace("DEVICE", str(group.device)) for word in words]
                complaints += complaints_about(name, lambda call=call: call_and_wait(g, call), kind, words)
            sent = group.dispatch(g.x * (rank + 1), Routing(g.topk_idx))
            home = group.combine(sent.x, sent.plan)
            if not torch.equal(home.x.cpu(), g.x * (rank + 1) * torch.tensor([[1.0], [1.0], [2.0]])):
                complaints.append(f"{name}: the round trip after it went wrong")
    return complaints


def call_and_wait(g, call) -> None:
    call(g)
    g.group.synchronize()  # a device may report its findings no earlier


def complaints_about(name: str, call, kind: type[Exception], words: list[str]) -> list[str]:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - compared with the expected one
        if type(error) is not kind:
            return [f"{name}: raised {error!r} instead of {kind.__name__}"]
        return [f"{name}: {word!r} is not in {str(error)!r}" for word in words if word not in str(error)]
    # A call that was sent puts the ranks out of step: there is nothing to go on with.
    raise AssertionError(f"{name}: the call was accepted")


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
