"""Every bad call raises before anything is sent, says what is wrong and what to do, and harms nobody."""

import pytest
import torch
from bad_calls import BAD
from good_calls import SHAPE, good
from pairs import Pair

from tokenferry import Routing


def call_badly(rank, pg, pair: Pair, names: list[str]) -> list[str]:
    """Turn by turn one rank makes the bad call, and then both make a round trip together."""
    complaints = []
    with pair.open(pg, SHAPE) as group, pair.open(pg, SHAPE) as stranger:
        g = good(pg, group, stranger)
        for i, name in enumerate(names):
            call, kind, words = BAD[name]
            if rank == i % 2:
                complaints += complaints_about(name, lambda call=call: call(g), kind, words)
            sent = group.dispatch(g.x * (rank + 1), Routing(g.topk_idx))
            home = group.combine(sent.x, sent.plan)
            if not torch.equal(home.x, g.x * (rank + 1) * torch.tensor([[1.0], [1.0], [2.0]])):
                complaints.append(f"{name}: the round trip after it went wrong")
    return complaints


def complaints_about(name: str, call, kind: type[Exception], words: tuple[str, ...]) -> list[str]:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - whatever comes is compared with what should have come
        if type(error) is not kind:
            return [f"{name}: raised {error!r} instead of {kind.__name__}"]
        return [f"{name}: {word!r} is not in {str(error)!r}" for word in words if word not in str(error)]
    # A call that was sent puts the ranks out of step: there is nothing to go on with.
    raise AssertionError(f"{name}: the call was accepted")


def test_the_table_is_long_enough():
    assert len(BAD) >= 40


def test_bad_calls_of_one_rank_harm_nobody(worlds, pair):
    complaints = worlds(2).run(call_badly, pair, list(BAD))
    assert complaints == [[], []], "\n".join(complaint for rank in complaints for complaint in rank)


@pytest.mark.parametrize("name", ["x is too narrow", "an expert is too high", "y has too many rows"])
def test_bad_calls_of_all_ranks_harm_nobody(worlds, pair, name):
    complaints = worlds(2).run(call_badly, pair, [name, name])
    assert complaints == [[], []]
