"""Clip gradients by their norm, where experts have replicas, or parameters are of several meshes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenferry.errors import ArgumentError, ConfigError
from tokenferry.nn.balance.placement import Placement
from tokenferry.nn.layer import MoELayer
from tokenferry.nn.sharding import local_part, local_with_gradient

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement as Placed


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale the gradients of a model in place, so that their norm is at most ``max_norm``; return it as it was before.

    As `torch.nn.utils.clip_grad_norm_`, with two differences. An expert with replicas counts once, wherever it is, so
    that the norm is that of the same model without replicas; torch's function sees only slots, and counts each. And
    parameters may be DTensors of any meshes and plain tensors at once, which torch's refuses.

    Contract:
        Collective: over the meshes of all DTensors; call it on every rank, between backward and the step. Never waits
            for the device, unless ``error_if_nonfinite``.
        Gradients: those of replicated parameters have to be averaged over the ranks before, as always; those of
            replicas are equal, as `MoELayer` makes them.

    Args:
        model: A module, wrapped by DistributedDataParallel or not, with FSDP2 or without; all its parameters count that
            have a gradient.
        max_norm: The most that the norm may be afterwards; infinity leaves the gradients as they are.
        norm_type: The p of the p-norm, above 0; infinity for the largest absolute value.
        error_if_nonfinite: Whether a norm that is NaN or infinite raises.

    Returns:
        Tensor: 0-dimensional, plain, on the device of the gradients, the same on every rank.

    Raises:
        ArgumentError: ``model`` is no module, ``norm_type`` is not above 0, or ``max_norm`` is below 0.
        ConfigError: a tool has sharded experts that have replicas otherwise than by ``Shard``.
        RuntimeError: torch's, for a norm that is not finite, with ``error_if_nonfinite``; or if a rank does not come
            within the timeout of the process group of a mesh (NCCL's watchdog may end the process instead). Nothing was
            scaled.

    Example:
        >>> import torch
        >>> from tokenferry.nn import clip_grad_norm_
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> model(torch.ones(4)).backward()
        >>> clip_grad_norm_(model, 1.0), model.weight.grad
        (tensor(2.), tensor([[0.5000, 0.5000, 0.5000, 0.5000]]))
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"clip_grad_norm_: model: expected a torch.nn.Module, got {type(model).__name__}; pass the model, not its "
            "parameters, which do not know of replicas"
        )
    if not isinstance(norm_type, int | float) or not norm_type > 0:
        raise ArgumentError(f"clip_grad_norm_: norm_type: expected a number above 0, got {norm_type!r}")
    if not isinstance(max_norm, int | float) or not max_norm >= 0:
        raise ArgumentError(f"clip_grad_norm_: max_norm: expected a number from 0 on, got {max_norm!r}")
    placements = _redundant_placements(model)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        grad = parameter.grad
        assert grad is not None
        if parameter in placements:
            grad = _norms_of_experts(grad, placements[parameter], norm_type)
        by_mesh.setdefault(getattr(grad, "device_mesh", None), []).append(grad)
    norms = [_whole(nn.utils.get_total_norm(grads, norm_type)) for grads in by_mesh.values()]
    norm: Tensor = nn.utils.get_total_norm(norms, norm_type, error_if_nonfinite)
    nn.utils.clip_grads_with_norm_([local_with_gradient(parameter) for parameter in parameters], max_norm, norm)
    return norm


def _redundant_placements(model: nn.Module) -> dict[nn.Parameter, Placement]:
    """Return the parameters of experts of which some have replicas, with the placement of each."""
    routers = {layer: layer._placed for layer in model.modules() if isinstance(layer, MoELayer)}
    return {
        parameter: router._current()
        for layer, router in routers.items()
        if router is not None and router.is_redundant
        for parameter in layer.expert_parameters()
    }


def _norms_of_experts(grad: Tensor, placement: Placement, norm_type: float) -> Tensor:
    """Return norms for a gradient ``[P, ...]``, sharded alike: those of each expert in its first slot, and else 0."""
    part, first = local_part(grad), placement.logical_to_physical[:, 0].tolist()
    begin = 0 if part is grad else _first_slot(grad)
    here = [slot - begin for slot in first if begin <= slot < begin + part.shape[0]]
    # One for what this rank has of each slot, which need not be all of it.
    norms = part.new_zeros(part.shape[0], *[1] * (part.ndim - 1))
    if here and part.numel():
        rest = tuple(range(1, part.ndim))
        found = torch.linalg.vector_norm(part, norm_type, dim=rest, keepdim=True) if rest else part.abs()
        norms[here] = found[here]
    return norms if part is grad else _sharded_alike(norms, grad)


def _first_slot(grad: Tensor) -> int:
    """Return the first slot of which this rank has a part, which may be fewer than others have. Local."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = _layout(grad)
    if any(type(one) not in (Replicate, Shard) for one in placements):
        raise ConfigError(
            f"clip_grad_norm_: model: gradients of experts with replicas are placed as {placements}; expected Shard "
            "and Replicate only"
        )
    _, offsets = compute_local_shape_and_global_offset(grad.shape, mesh, placements)
    return offsets[0]


def _sharded_alike(norms: Tensor, grad: Tensor) -> Tensor:
    """Return the tensor of which each rank has such a part, with a number for each part of a slot. Local."""
    from torch.distributed.tensor import DTensor

    mesh, placements = _layout(grad)
    shape = [grad.shape[0], *[1] * (grad.ndim - 1)]
    for size, one in zip(mesh.shape, placements, strict=True):
        dim = getattr(one, "dim", 0)
        shape[dim] *= size if dim else 1
    stride = torch.empty(shape, device="meta", dtype=norms.dtype).stride()
    return DTensor.from_local(norms, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _layout(tensor: Tensor) -> tuple[DeviceMesh, Sequence[Placed]]:
    """Return the mesh of a DTensor, and how it is placed there."""
    dtensor: Any = tensor
    return dtensor.device_mesh, dtensor.placements


def _whole(norm: Tensor) -> Tensor:
    """Return the norm of all ranks."""
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole
