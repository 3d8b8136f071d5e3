"""Calls inside of functions that torch.compile compiles: it breaks its graph there, and they run as they always do."""

import pytest
import torch

from support import compiled_jobs as jobs
from support.pairs import Pair
from tokenferry import DispatchOptions, ExpertGroup, Routing
from tokenferry.ambient import not_compiled

ALONE, TOGETHER = Pair("cpu", "none"), Pair("cpu", "shared_memory")


@pytest.mark.parametrize(
    ("pair", "ranks", "job"),
    [(ALONE, 1, jobs.group_calls), (ALONE, 1, jobs.decode_calls), (TOGETHER, 2, jobs.decode_calls)],
)
def test_the_same_bits_with_any_number_of_tokens(run, pair, ranks, job):
    assert min(run(pair, ranks, job)) >= 120


def test_groups_and_buffers_that_a_compiled_function_makes():
    assert jobs.compare(0, {"short-lived": jobs.short_lived}) == 30


def test_one_graph_is_refused_with_the_calls_that_it_can_hold():
    with ExpertGroup(None, jobs.SHAPE, backend="cpu") as group:

        def program(x, chosen, weights):
            return group.dispatch(x, Routing(chosen, weights), options=DispatchOptions()).x

        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"tokenferry\.autograd"):
            torch.compile(program, fullgraph=True, backend="eager")(*jobs.inputs(0, 3))
        assert program(*jobs.inputs(0, 3)).shape[1] == jobs.H


def test_wrappers_of_torch_are_not_marked():
    """They share their code with those of the program, which would not be compiled any more either."""
    with pytest.raises(AssertionError, match="wraps"):
        not_compiled(torch.no_grad()(lambda x: x + 1))
