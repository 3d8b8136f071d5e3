"""Parameters that know which part of all experts they hold: DTensors over the ranks of a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokenferry.autograd.sums import sum_over
from tokenferry.errors import ConfigError

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


@dataclass(frozen=True, slots=True, eq=False)
class SameExperts:
    """The ranks that hold the same experts as this one, each in a group of its own: data parallelism of experts.

    Attributes:
        group: These ranks.
    """

    group: dist.ProcessGroup

    @property
    def num(self) -> int:
        """How many they are."""
        return self.group.size()

    def share(self, tensor: Tensor, device: torch.device) -> None:
        """Give a tensor of these ranks the values that it has on the first of them, if it has some.

        Contract: collective. Values travel from and to ``device``, since not all buffers need be where experts are.
        """
        part = local_part(tensor).detach()
        if not part.is_meta:
            values = part.to(device).contiguous()
            dist.broadcast(values, group_src=0, group=self.group)
            part.copy_(values)

    def __deepcopy__(self, memo: dict[int, object]) -> SameExperts:
        return self  # so that copies of a model, such as a moving average, share it


def by_place(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module by their places among its modules; one that is in several, by each of them.

    `named_parameters` of torch's wrappers leaves the wrapper out of the names.
    """
    return {
        f"{place}.{name}" if place else name: parameter
        for place, part in module.named_modules()
        for name, parameter in part.named_parameters(recurse=False)
    }


def check_hooks(call: str, module: nn.Module, mesh: DeviceMesh) -> None:
    """Raise ConfigError, in the name of ``call``, if `shard_parameters` would lose hooks of a parameter. Local."""
    for name, parameter in by_place(module).items():
        hooks = [getattr(parameter, kind, None) for kind in ("_backward_hooks", "_post_accumulate_grad_hooks")]
        if any(hooks) and getattr(parameter, "device_mesh", None) != mesh:
            raise ConfigError(
                f"{call}: experts: {name}: has hooks, and would be replaced by a parameter without them; register them "
                "afterwards"
            )


@torch.no_grad()
def shard_parameters(
    module: nn.Module, mesh: DeviceMesh, known: dict[nn.Parameter, nn.Parameter] | None = None
) -> None:
    """Replace the parameters of a module by DTensors, of which they are the part of this rank of the mesh. Local.

    Args:
        module: The module.
        mesh: The mesh.
        known: Parameters that were replaced already, also in other modules, by what: those that are one stay one.

    Raises:
        ConfigError: a parameter has hooks, which would be lost; nothing of the module was replaced.
    """
    known = {} if known is None else known
    check_hooks("MoELayer", module, mesh)
    for part in module.modules():
        for name, old in part.named_parameters(recurse=False):
            if getattr(old, "device_mesh", None) == mesh:
                continue
            if old not in known:
                known[old] = _sharded_parameter(old, mesh)
            setattr(part, name, known[old])


def _sharded_parameter(old: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """Return a parameter of all experts with what the old one, this rank's part of it, has. Local."""
    new = nn.Parameter(sharded(local_part(old).detach(), mesh), requires_grad=old.requires_grad)
    if _gradient_dtype(old) != old.dtype:
        new.grad_dtype = _gradient_dtype(old)
    if old.grad is not None:
        new.grad = sharded(local_part(old.grad), mesh)
    new.__dict__.update(old.__dict__)  # attributes that somebody has given it
    return new


def _gradient_dtype(parameter: Tensor) -> torch.dtype | None:
    """Return the dtype in which a parameter keeps its gradient: its own, unless somebody asked for another."""
    dtype: torch.dtype | None = getattr(parameter, "grad_dtype", parameter.dtype)  # of torch from 2.10 on
    return dtype


def not_sharded(parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of those that are no DTensors."""
    from torch.distributed.tensor import DTensor

    return [name for name, parameter in parameters.items() if not isinstance(parameter, DTensor)]


def local_part(parameter: Tensor) -> Tensor:
    """Return what this rank holds of a parameter: its part of a DTensor, all of another."""
    part: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return part


def local_with_gradient(parameter: nn.Parameter) -> Tensor:
    """Return what this rank holds of a parameter, with its gradient: the same memory."""
    assert parameter.grad is not None
    part, grad = local_part(parameter).detach(), local_part(parameter.grad)
    if grad.dtype != part.dtype:
        part.grad_dtype = grad.dtype
    part.grad = grad
    return part


def averaged_gradient(weight: Tensor, num_ranks: int, same_experts: SameExperts | None = None) -> Tensor:
    """Return ``weight``; in backward its gradient, a sum over ranks, becomes the mean over all who train.

    Contract: backward is collective over the ranks with the same experts, if there are any.
    """
    if num_ranks == 1:
        return weight
    name, num = (None, 1) if same_experts is None else (same_experts.group.group_name, same_experts.num)
    out: Tensor = _AveragedGradient.apply(weight, num_ranks * num, name)  # type: ignore[no-untyped-call]
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
    process_group: str | None


def _mean(grad: Tensor, num_ranks: int, process_group: str | None) -> Tensor:
    mean = grad / num_ranks
    return mean if process_group is None else sum_over(mean, process_group)


class _AveragedGradient(torch.autograd.Function):
    """Divide the gradient by ``num_ranks``, and add up those of all ranks of ``process_group``, if there is one.

    On one side of this function are the parameters of all ranks, of which gradients are those of the mean of the losses
    of ranks; on the other side is what a rank computes, of which they are those of the sum. Gradients of gradients pass
    it as well, and are of the same two kinds: so the derivative of `_Mean` is that of no division, but this function.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, num_ranks: int, process_group: str | None) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.num_ranks, ctx.process_group = inputs

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None]:
        # Compilers know no gradients of gradients, and where nobody asks for them a function costs time.
        mean = _Mean.apply if torch.is_grad_enabled() else _mean
        return mean(grad, ctx.num_ranks, ctx.process_group), None, None


class _Mean(torch.autograd.Function):
    """The gradient of a parameter from what ranks have computed; a gradient of it comes back to each rank as it is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, num_ranks: int, process_group: str | None) -> Tensor:
        return _mean(grad, num_ranks, process_group)

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.num_ranks, ctx.process_group = inputs

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None]:
        out: Tensor = _AveragedGradient.apply(grad, ctx.num_ranks, ctx.process_group)  # type: ignore[no-untyped-call]
        return out, None, None
