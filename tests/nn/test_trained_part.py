"""What a layer takes of sharded experts where torch's own function is differentiable once only, as in torch 2.11."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from support import parallel_jobs
from support.closeness import close
from support.training_jobs import Recipe
from tokenferry.nn import sharding


def differentiated(rank: int, pg: dist.ProcessGroup, tool: str) -> Tensor | str:
    """Return a second derivative, as under torch 2.11."""
    with mock.patch.object(sharding, "_TO_LOCAL_ONCE", True):
        return parallel_jobs.differentiated(rank, pg, tool)


@pytest.mark.parametrize("tool", ["hand", "ddp"])
def test_second_derivatives_of_older_torch(worlds, tool):
    for got in worlds(2).run(differentiated, tool):
        close("second", got, parallel_jobs.differentiated_alone(2), 1e-12)


def taken(rank: int, pg: dist.ProcessGroup) -> None:
    recipe = Recipe("hand")
    with recipe.open_group(pg) as group:
        model = parallel_jobs.prepared(parallel_jobs.Model(group, recipe.dtype), recipe, pg)
        gate = model.moe[0].experts.gate
        for part in (sharding._TrainedPart.apply(gate), gate.to_local()):
            assert part.requires_grad
            assert part.data_ptr() == gate._local_tensor.data_ptr()
            (grad,) = torch.autograd.grad(part.square().sum(), gate)
            assert (grad.shape, grad.stride(), grad.placements) == (gate.shape, gate.stride(), gate.placements)
            assert grad.device_mesh == gate.device_mesh
            assert torch.equal(grad.to_local(), 2 * gate.to_local())
        assert not gate._local_tensor.requires_grad, "the parameter would hold its own graph, and never be freed"


def test_parts_are_those_of_torch(worlds):
    worlds(2).run(taken)
