"""What a layer takes of sharded experts where torch's own function is differentiable once only, as in torch 2.11."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from support import parallel_jobs
from support.closeness import close
from support.training_jobs import Recipe
from tokenferry.autograd import local_parts


def differentiated(rank: int, pg: dist.ProcessGroup, tool: str) -> Tensor | str:
    """Return a second derivative, as under torch 2.11."""
    with mock.patch.object(local_parts, "_TO_LOCAL_ONCE", True):
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
        for part in (local_parts._TrainedPart.apply(gate), gate.to_local()):
            assert part.requires_grad
            assert part.data_ptr() == gate._local_tensor.data_ptr()
            (grad,) = torch.autograd.grad(part.square().sum(), gate, retain_graph=True)
            assert (grad.shape, grad.stride(), grad.placements) == (gate.shape, gate.stride(), gate.placements)
            assert grad.device_mesh == gate.device_mesh
            assert torch.equal(grad.to_local(), 2 * gate.to_local())
            # As a product with a transposed weight gives it: strides say how it lies, or nobody makes it contiguous.
            transposed = torch.ones_like(part).transpose(1, 2).contiguous().transpose(1, 2)
            (grad,) = torch.autograd.grad(part, gate, transposed)
            assert grad.stride()[1:] == grad.to_local().stride()[1:]
        assert not gate._local_tensor.requires_grad, "the parameter would hold its own graph, and never be freed"


def taken_of_rows(rank: int, pg: dist.ProcessGroup) -> None:
    """Activations: ranks may hold different numbers of rows, all of them, or addends."""
    mesh = DeviceMesh("cpu", range(pg.size()))
    for placement in (Shard(0), Replicate(), Partial()):
        rows = torch.randn(3 - rank if placement.is_shard() else 3, 4, dtype=torch.float64)
        shape = {"shape": (5, 4) if placement.is_shard() else (3, 4), "stride": (4, 1)}
        whole = DTensor.from_local(rows, mesh, [placement], run_check=False, **shape).requires_grad_()
        grads = []
        for part in (local_parts._TrainedPart.apply(whole), whole.to_local()):
            (grad,) = torch.autograd.grad(part.square().sum(), whole, retain_graph=True)
            grads.append((grad.shape, grad.stride(), grad.placements, grad.to_local().tolist()))
            transposed = torch.ones(part.shape[::-1], dtype=part.dtype, device="cpu").T
            (grad,) = torch.autograd.grad(part, whole, transposed)
            if not placement.is_shard():  # torch's own keeps strides that are not those of all ranks
                grads[-1] += (grad.stride(), grad.to_local().stride())
            assert grad.shape == whole.shape
        assert grads[0] == grads[1]
        assert grads[0][3] == (2 * rows).tolist()


def test_rows_are_those_of_torch(worlds):
    worlds(2).run(taken_of_rows)


def test_parts_are_those_of_torch(worlds):
    worlds(2).run(taken)
