"""What the routers of a model do together between forward and the step of the optimizer, to keep experts balanced."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tokenferry.errors import ConfigError
from tokenferry.nn.layer import MoELayer
from tokenferry.nn.losses import RouterLosses
from tokenferry.nn.router import Router


def auxiliary_losses(model: nn.Module) -> RouterLosses:
    """Return the sums of the auxiliary losses of the last forward over all routers of a model that compute them.

        losses = auxiliary_losses(model)
        loss = loss + 0.01 * losses.balance + 0.001 * losses.z

    Contract: local; differentiable. Takes the losses from the routers, which forget them. They are values of this
    rank's tokens: add them to the loss of this rank, and the gradients are those of the mean over ranks; see
    `RouterLosses`.

    Args:
        model: A module with at least one `Router` with ``RouterOptions(losses=True)``.

    Raises:
        ConfigError: there is no such router; one of them is shared by several layers, and has the losses of the last
            one only; one of them has no losses, since it has not run since they were last taken; or its losses have no
            graph, though gradients are enabled: it ran under ``torch.no_grad()``, or in
            ``checkpoint(use_reentrant=True)``, which runs forward without a graph. There, use the other kind.
    """
    routers = {
        name: module for name, module in model.named_modules() if isinstance(module, Router) and module.options.losses
    }
    if not routers:
        raise ConfigError(
            "auxiliary_losses: model: expected a Router with RouterOptions(losses=True), found none; make one with it"
        )
    choices = [layer._choice for layer in model.modules() if isinstance(layer, MoELayer)]
    found = []
    for name, router in routers.items():
        if choices.count(router) > 1:
            raise ConfigError(
                f"auxiliary_losses: {name or 'model'!r} is the router of {choices.count(router)} layers, and has the "
                "losses of the last one only; give each layer a Router of its own, which may share the weight: "
                "other.weight = router.weight"
            )
        if router.losses is None:
            raise ConfigError(
                f"auxiliary_losses: {name or 'model'!r} has no losses; call forward before each call of this"
            )
        if torch.is_grad_enabled() and router.weight.requires_grad and not router.losses.z.requires_grad:
            raise ConfigError(
                f"auxiliary_losses: the losses of {name or 'model'!r} have no gradients, since its forward ran without "
                "them: under torch.no_grad(), or in checkpoint(use_reentrant=True); use use_reentrant=False"
            )
        found.append(router.losses)
    for router in routers.values():
        router.losses = None
    balance, z = torch.stack([one.balance for one in found]).sum(), torch.stack([one.z for one in found]).sum()
    return RouterLosses(balance, z)


@torch.no_grad()
def update_biases(model: nn.Module, *, rate: float = 0.001) -> None:
    """Call `Router.update_bias` for all layers of a model, with the loads of all ranks since the last call.

    The balancing without an auxiliary loss of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2). Call it after each step of
    the optimizer. A router that several layers share takes one step, for the sum of their loads.

    Contract: collective, one all-reduce over each process group, and one over the ranks with the same experts that
    `parallelize` was given; every rank gets the same biases. Loads are those of forward passes in training mode; a pass
    that a checkpoint repeats does not count, unless it is compiled.

    Args:
        model: A module with at least one `MoELayer` whose router is a `Router` with a bias.
        rate: Step size: gamma of the paper, which uses 0.001.

    Raises:
        ConfigError: there is no such layer; or its router may be that of more ranks than those whose loads are added
            up: its group is smaller than the default process group, and `parallelize` was not given the ranks that hold
            the same experts, or was given fewer than those of DistributedDataParallel or FSDP2. No bias was changed.
        RuntimeError: torch's, if a rank does not come within the timeout of the process group, which is not
            ``timeout_s``; NCCL's watchdog may end the process instead. No bias of this rank was changed; its loads
            since the last call are lost.
    """
    found = model.named_modules()
    layers = {name: module for name, module in found if isinstance(module, MoELayer) and module._has_bias}
    if not layers:
        raise ConfigError(
            "update_biases: model: expected a MoELayer whose router has a bias, found none; make it with "
            "Router(..., group_limit=GroupLimit(1, 1))"
        )
    by_group: dict[tuple[dist.ProcessGroup, ...], list[MoELayer]] = {}
    for name, layer in layers.items():
        _check_counted(model, name, layer)
        by_group.setdefault(_groups(layer), []).append(layer)
    totals: dict[Router, Tensor] = {}
    for groups, members in by_group.items():
        flat = torch.cat([_load(layer) for layer in members])
        for group in groups:
            dist.all_reduce(flat, group=group)
        loads = flat.split([_bias(layer).numel() for layer in members])  # type: ignore[no-untyped-call]
        for layer, load in zip(members, loads, strict=True):
            choice = _biased(layer)
            totals[choice] = load + totals.get(choice, 0)
    for router, load in totals.items():  # one step each, also of a router that several layers share
        router.update_bias(load, rate=rate)


def _check_counted(model: nn.Module, name: str, layer: MoELayer) -> None:
    """Raise ConfigError if more ranks may share the router of a layer than those whose loads are added up."""
    counted = layer.group.num_ranks * (1 if layer._same_experts is None else layer._same_experts.num)
    mesh = getattr(_biased(layer).weight, "device_mesh", None)  # of FSDP2
    sharers = 1 if mesh is None else mesh.size()
    if isinstance(model, DistributedDataParallel):
        sharers = model.process_group.size()
    if not layer._replicate_given and dist.is_initialized():
        sharers = dist.get_world_size()
    if counted < sharers:
        raise ConfigError(
            f"update_biases: {name or 'model'!r}: {sharers} ranks may share its router, and the loads of {counted} "
            "would be added up; tell parallelize(model, replicate=) which ranks hold the same experts as this one, or "
            "replicate=False if all others have models of their own"
        )


def _groups(layer: MoELayer) -> tuple[dist.ProcessGroup, ...]:
    """Return the process groups over which the loads of a layer are added up, one after the other."""
    groups = [] if layer.group.num_ranks == 1 else [layer.group.process_group]
    if layer._same_experts is not None:
        groups.append(layer._same_experts.group)
    return tuple(group for group in groups if group is not None)


def _biased(layer: MoELayer) -> Router:
    choice = layer._choice
    assert isinstance(choice, Router)
    return choice


def _bias(layer: MoELayer) -> Tensor:
    bias = _biased(layer).bias
    assert bias is not None
    return bias


def _load(layer: MoELayer) -> Tensor:
    """Return ``[E]`` int64: the rows of this rank's experts since the last call, and 0 for all others."""
    load = torch.zeros(_bias(layer).shape, dtype=torch.int64, device=layer.group.device)
    for held, mine in layer._take_loads():
        load.index_add_(0, torch.tensor(held, dtype=torch.int64, device="cpu").to(load.device), mine)
    return load
