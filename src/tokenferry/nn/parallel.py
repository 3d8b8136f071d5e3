"""Prepare a model with `MoELayer` for the tools that spread or copy the rest of it over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn

from tokenferry.errors import ConfigError
from tokenferry.nn.layer import MoELayer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def parallelize(model: nn.Module, mesh: DeviceMesh | None = None) -> set[nn.Parameter]:
    """Make DistributedDataParallel leave the experts of a model alone, and return them, for FSDP2 to do the same.

    Both tools would give every rank the experts of rank 0; without this call both raise instead.

        experts = parallelize(model, mesh)
        model = DistributedDataParallel(model)                      # one of the two
        fully_shard(model, mesh=mesh, ignored_params=experts)       # also of each submodule

    Contract: local; replaces the parameters if ``mesh`` is another than theirs: call it before the optimizer is made,
    on every rank.

    Args:
        model: A module with any number of `MoELayer`, which may be on the meta device.
        mesh: One dimension with the ranks of the layers' groups, in their order: the mesh of ``fully_shard``. Clipping
            and foreach optimizers take parameters of one mesh only. None: the layers keep their own, which is enough
            for DistributedDataParallel.

    Returns:
        set[nn.Parameter]: ``expert_parameters`` of all layers.

    Raises:
        ConfigError: the model has no `MoELayer`, or ``mesh`` has more than one dimension, or other ranks or
            another device type than the group of one of them.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    if not layers:
        raise ConfigError("parallelize: model: expected a module with at least one MoELayer, found none")
    if mesh is not None:
        for name, layer in layers.items():
            _check_mesh(mesh, name, layer)
        for layer in layers.values():
            layer.place_experts(mesh)
    experts = {parameter for layer in layers.values() for parameter in layer.expert_parameters()}
    names = [name for name, parameter in model.named_parameters() if parameter in experts]
    ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(model, names)  # type: ignore[no-untyped-call]
    return experts


def _check_mesh(mesh: DeviceMesh, name: str, layer: MoELayer) -> None:
    group = layer.group
    if mesh.ndim != 1:
        raise ConfigError(
            f"parallelize: mesh: expected one dimension, got {list(mesh.shape)}; pass a slice of it, e.g. mesh['ep']"
        )
    got = mesh.mesh.tolist()
    want = [dist.get_rank()] if group.process_group is None else dist.get_process_group_ranks(group.process_group)
    if got != want:
        raise ConfigError(
            f"parallelize: mesh: expected the ranks {want} of the group of {name or 'model'!r}, got {got}; make the "
            "group with mesh.get_group()"
        )
    if mesh.device_type != group.device.type:
        raise ConfigError(
            f"parallelize: mesh: expected device type {group.device.type!r} like the group of {name or 'model'!r}, "
            f"got {mesh.device_type!r}"
        )
