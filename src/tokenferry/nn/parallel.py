"""Prepare a model with `MoELayer` for the tools that spread or copy the rest of it over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch.distributed as dist
from torch import nn

from tokenferry.errors import ConfigError
from tokenferry.nn.balance.replicas import make_replicas_equal
from tokenferry.nn.expert_checks import check_experts
from tokenferry.nn.experts import seeded_parameters
from tokenferry.nn.layer import MoELayer
from tokenferry.nn.sharding import SameExperts, by_place, check_hooks, local_part

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    replicate: DeviceMesh | dist.ProcessGroup | Literal[False] | None = None,
) -> set[nn.Parameter]:
    """Make DistributedDataParallel leave the experts of a model alone, and return them, for FSDP2 to do the same.

    Both tools would give every rank the experts of rank 0; without this call both raise instead. Buffers of the experts
    are left alone, too, which DistributedDataParallel would overwrite in each forward.

        experts = parallelize(model, mesh)
        model = DistributedDataParallel(model)                      # one of the two
        fully_shard(model, mesh=mesh, ignored_params=experts)       # also of each submodule

    Where experts are spread over some of the ranks only, and others hold the same experts again, backward of the layers
    averages their gradients over those others:

        mesh = init_device_mesh("cuda", (D, R), mesh_dim_names=("replicate", "experts"))
        group = ExpertGroup(mesh["experts"].get_group(), shape)
        experts = parallelize(model, mesh["experts"], replicate=mesh["replicate"])
        fully_shard(model, mesh=mesh, ignored_params=experts)       # or DistributedDataParallel(model)

    Contract: local, without ``replicate``; with a mesh or a process group there collective over these ranks, which get
    the experts of the first of them, with their buffers, as DistributedDataParallel does it with the rest. With a
    `PlacedRouter` that has replicas collective over the group: all replicas of an expert become its first one, also of
    parameters that were registered after the experts were initialised. Replaces the parameters if ``mesh`` is another
    than theirs: call it before the optimizer is made, and before hooks are registered, on every rank. Gradients and
    attributes of parameters are kept, and parameters that are one stay one. What DistributedDataParallel was told to
    ignore before stays ignored. If it raises ConfigError, nothing was changed.

    It may be called again, also after the tool: then without ``replicate`` layers keep what they were given, and the
    ranks get the same experts again. Experts on the meta device need that if they are not ours, which are initialised
    alike on all ranks: call it again when they have values; forward raises without it.

    Args:
        model: A module with any number of `MoELayer`, which may be on the meta device.
        mesh: One dimension with the ranks of the layers' groups, in their order: the mesh of ``fully_shard``, or a
            slice of it. Torch's `clip_grad_norm_`, and foreach optimizers of some versions, take parameters of one mesh
            only; `clip_grad_norm_` of this module takes any. None: the layers keep their own, which is enough for
            DistributedDataParallel.
        replicate: The ranks that hold the same experts as this one, itself included, if the groups of the layers are
            smaller than the default process group, also if each rank has all experts; False: there are none, as where
            the others are other stages of a pipeline. Layers must not have a `PlacedRouter` then, whose placements
            differ between groups. Where layers of one model have groups of different sizes, first call this function
            for each layer whose group is smaller, and then for the model, without ``replicate``.

    Returns:
        set[nn.Parameter]: ``expert_parameters`` of all layers whose groups have several ranks. Experts that are all on
        one rank are parameters like others, for the tools to copy or to shard.

    Raises:
        ConfigError: the model has no `MoELayer`; experts have become such that no layer could be made of them, e.g. by
            a parameter without L as its first dimension; ``mesh`` has more than one dimension, or other ranks or
            another device type than the group of one of them; ``replicate`` is missing, has more than one dimension,
            leaves this rank out, has other ranks of a layer's group, which hold other experts, or meets a
            `PlacedRouter`; or a parameter that is to be replaced has hooks.
        ArgumentError: the ranks of a layer's group have different placements of replicas, or other tensors; on all of
            them, before any replica was changed.
        RuntimeError: torch's, if one of the ranks of ``replicate``, or of a group with replicas, does not come within
            the timeout of its process group (NCCL's watchdog may end the process instead). Layers have been changed:
            make the model anew.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    if not layers:
        raise ConfigError("parallelize: model: expected a module with at least one MoELayer, found none")
    spread = {name: layer for name, layer in layers.items() if layer.group.num_ranks > 1}
    given = _same_experts(replicate)
    for name, layer in layers.items():
        _check_replicate_given(name, layer, given=replicate is not None or layer._replicate_given)
        same_experts = layer._same_experts if replicate is None else given
        if same_experts is not None:
            _check_same(same_experts, name, layer)
    for layer in spread.values():
        check_experts(layer.group, layer.experts)
    if mesh is not None:
        for name, layer in spread.items():
            _check_mesh(mesh, name, layer)
            check_hooks(f"parallelize: {name or 'model'!r}", layer.experts, mesh)
        known: dict[nn.Parameter, nn.Parameter] = {}
        for layer in spread.values():
            layer._place_experts(mesh, known)
    if replicate is not None:
        for layer in layers.values():
            layer._same_experts, layer._replicate_given = given, True
    experts = {parameter for layer in spread.values() for parameter in layer.expert_parameters()}
    for layer in layers.values():
        layer._unequal = ", ".join(_share(layer))
    # It asks by both kinds of names, which differ where torch's wrappers are.
    names = {
        name
        for named in (dict(model.named_parameters()), by_place(model))
        for name, parameter in named.items()
        if parameter in experts
    }
    buffers = {buffer for layer in spread.values() for buffer in layer.experts.buffers()}
    names.update(name for name, buffer in model.named_buffers(remove_duplicate=False) if buffer in buffers)
    names.update(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(model, sorted(names))  # type: ignore[no-untyped-call]
    return experts


def _share(layer: MoELayer) -> list[str]:
    """Make the experts of ranks that hold the same ones equal, or replicas; return what has no values to share yet.

    Ours are left out, which are initialised from one seed on all ranks, and in all slots, when they get values.
    """
    group, placed = layer.group, layer._placed
    same_experts = layer._same_experts if group.num_ranks > 1 else None  # else tools copy or shard them
    redundant = placed is not None and placed.is_redundant
    if same_experts is None and not redundant:
        return []
    seeded = seeded_parameters(layer.experts)
    tensors = {**dict(layer.experts.named_parameters()), **dict(layer.experts.named_buffers())}
    if same_experts is not None:
        for tensor in tensors.values():
            same_experts.share(tensor, group.device)
    if placed is not None and redundant:
        # What a tool has sharded, of a group of one rank, it has in other parts.
        own = [tensor for tensor in tensors.values() if group.num_ranks > 1 or not hasattr(tensor, "device_mesh")]
        make_replicas_equal(group, placed._current(), [local_part(tensor).detach() for tensor in own])
    return [name for name, value in tensors.items() if value.is_meta and value not in seeded]


def _check_replicate_given(name: str, layer: MoELayer, *, given: bool) -> None:
    """Raise ConfigError if there are ranks outside of the group of a layer, and it was not given what they hold."""
    num_ranks, all_ranks = layer.group.num_ranks, dist.get_world_size() if dist.is_initialized() else 1
    if num_ranks < all_ranks and not given:
        raise ConfigError(
            f"parallelize: replicate: the group of {name or 'model'!r} has {num_ranks} of {all_ranks} ranks; pass the "
            "ranks that hold the same experts as this one, e.g. replicate=mesh['replicate'], or replicate=False if "
            "there are none"
        )


def _same_experts(replicate: DeviceMesh | dist.ProcessGroup | Literal[False] | None) -> SameExperts | None:
    """Return the ranks that hold the same experts, or None if no other does."""
    if replicate is None or replicate is False:
        return None
    if replicate == dist.GroupMember.NON_GROUP_MEMBER:
        raise ConfigError("parallelize: replicate: this rank is no member of the process group; pass its own")
    if not isinstance(replicate, dist.ProcessGroup):
        if not hasattr(replicate, "get_group"):
            got = type(replicate).__name__
            raise ConfigError(f"parallelize: replicate: expected a mesh, a process group, False or None, got {got}")
        if replicate.ndim != 1:
            raise ConfigError(
                f"parallelize: replicate: expected one dimension, got {list(replicate.shape)}; pass a slice of the "
                "mesh, e.g. mesh['replicate']"
            )
        replicate = replicate.get_group()
    return SameExperts(replicate) if replicate.size() > 1 else None


def _check_same(same_experts: SameExperts, name: str, layer: MoELayer) -> None:
    """Raise ConfigError if ranks with the same experts are said to be in the group of a layer, which spreads them."""
    if layer._placed is not None:
        raise ConfigError(
            f"parallelize: replicate: {name or 'model'!r} has a PlacedRouter, and each group may place its experts "
            "elsewhere; use one group of all ranks"
        )
    if layer.group.process_group is None:
        return
    same = dist.get_process_group_ranks(same_experts.group)
    group = dist.get_process_group_ranks(layer.group.process_group)
    if set(same) & set(group) != {dist.get_rank()}:
        raise ConfigError(
            f"parallelize: replicate: expected this rank and others outside of the group of {name or 'model'!r}, which "
            f"hold the same experts, got {same}; the ranks of the group, {group}, hold different ones. If other layers "
            "have smaller groups, call parallelize(layer, replicate=) for each of those, then parallelize(model) "
            "without it"
        )


def _check_mesh(mesh: DeviceMesh, name: str, layer: MoELayer) -> None:
    group = layer.group
    if mesh.ndim != 1:
        raise ConfigError(
            f"parallelize: mesh: expected one dimension, got {list(mesh.shape)}; pass a slice of it, e.g. mesh['ep']"
        )
    got = mesh.mesh.tolist()
    assert group.process_group is not None  # of several ranks
    want = dist.get_process_group_ranks(group.process_group)
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
