"""Ranks that follow plans of different dispatches, on CPUs: all of them notice, though all counts may be equal."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist

import tokenferry
from tokenferry import ExpertGroup, MismatchError, MoeShape, Routing
from tokenferry.autograd.ops import plan_of, tensors_of

SHAPE = MoeShape(num_experts=4, top_k=1, hidden=4, max_tokens=4)
CALLS = {
    "combine": lambda group, sent: group.combine(sent.x, sent.plan),
    "redispatch": lambda group, sent: group.redispatch(torch.ones(4, 4), sent.plan),
}


def follow_two(rank, pg, call: str, transport: str, ranks_per_node: int | None) -> str:
    """Each rank sends a token to each expert, twice, in two orders; the last rank follows the other plan."""
    orders = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]]).unsqueeze(-1)
    options = {"transport": transport, "ranks_per_node": ranks_per_node}
    own = dist.new_group(range(pg.size()))  # whose connections the error closes
    with ExpertGroup(own, SHAPE, backend="cpu", timeout_s=20.0, **options) as group:
        sent = [group.dispatch(torch.ones(4, 4), Routing(order)) for order in orders]
        with pytest.raises(MismatchError) as caught:
            CALLS[call](group, sent[rank == pg.size() - 1])
    return str(caught.value)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("transport", "ranks_per_node"), [("shared_memory", None), ("process_group", None), ("auto", 2)]
)
def test_all_ranks_notice(worlds, call, transport, ranks_per_node):
    for said in worlds(4).run(follow_two, call, transport, ranks_per_node):
        assert f"{call} " in said
        assert "dispatch of the plan is " in said


def test_copies_are_the_same_plan_and_compiled_functions_say_nothing(worlds):
    worlds(2).run(follow_copies)


def follow_copies(rank, pg) -> None:
    """Rank 1 has the plan as programs and compiled functions pass it on."""
    with tokenferry.ExpertGroup(pg, SHAPE, backend="cpu") as group:
        x = torch.arange(16.0).view(4, 4)
        group.dispatch(x, Routing(torch.zeros(4, 1, dtype=torch.int64)))
        plan = (sent := group.dispatch(x, Routing(torch.tensor([[3], [1], [0], [1]])))).plan
        through_ops = plan_of(tensors_of(plan), plan.group_key, plan.options, plan.num_tokens, plan.num_delivered)
        assert through_ops._call_number == 0
        assert {each._call_number for each in (plan, copy.copy(plan), pickle.loads(pickle.dumps(plan)))} == {2}
        for other in (copy.copy(plan), pickle.loads(pickle.dumps(plan)), through_ops):
            assert torch.equal(group.combine(sent.x, other if rank else plan).x, x)
