"""Parameters that know which part of all experts they hold: DTensors over the ranks of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from tokenferry.api import ExpertGroup

# torch.distributed.tensor takes a second to import: a process with all experts does without it.


def expert_mesh(group: ExpertGroup) -> DeviceMesh | None:
    """Return the ranks of a group as a mesh, for parameters with a part on each; None if one rank has all. Local."""
    if group.num_ranks == 1 or group.process_group is None:
        return None
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(group.process_group, group.device.type)


def sharded(part: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the tensor of all experts of which each rank of the mesh holds ``part`` ``[L, ...]``. Local."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False)


@torch.no_grad()
def shard_parameters(module: nn.Module, mesh: DeviceMesh) -> None:
    """Replace the parameters of a module by DTensors, of which they are the part of this rank of the mesh. Local."""
    known: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, old in part.named_parameters(recurse=False):
            if getattr(old, "device_mesh", None) == mesh:
                continue
            if id(old) not in known:  # parameters that are one stay one
                whole = sharded(local_part(old).detach(), mesh)
                known[id(old)] = nn.Parameter(whole, requires_grad=old.requires_grad)
            setattr(part, name, known[id(old)])


def local_part(parameter: Tensor) -> Tensor:
    """Return what this rank holds of a parameter: its part of a DTensor, all of another."""
    part: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return part


def local_with_gradient(parameter: nn.Parameter) -> Tensor:
    """Return what this rank holds of a parameter, with its gradient: the same memory."""
    assert parameter.grad is not None
    part = local_part(parameter).detach()
    part.grad = local_part(parameter.grad)
    return part


def averaged_gradient(weight: Tensor, num_ranks: int) -> Tensor:
    """Return ``weight``; in backward its gradient, a sum over ranks, is divided by their number."""
    if num_ranks == 1:
        return weight
    out: Tensor = _AveragedGradient.apply(weight, num_ranks)  # type: ignore[no-untyped-call]
    return out


@torch.no_grad()
def fill(parameter: Tensor, values: Tensor) -> None:
    """Give a parameter its values, cast to its dtype.

    Local.

    Args:
        parameter: Of the shape of ``values``; or a DTensor of that shape, of which this rank's part is filled.
        values: The same on every rank that holds a part.
    """
    mesh = getattr(parameter, "device_mesh", None)
    values = values.to(parameter.device, parameter.dtype)
    if mesh is not None:
        from torch.distributed.tensor import DTensor, Replicate

        whole = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
        values = whole.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    parameter.copy_(values)


class _Context(Protocol):
    """The state that forward saves for backward."""

    num_ranks: int


class _AveragedGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, num_ranks: int) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.num_ranks = inputs

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.num_ranks, None
