"""What a layer requires of its experts, whoever made them, and whenever their parameters were added."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from tokenferry.ambient import not_compiled
from tokenferry.api import ExpertGroup
from tokenferry.errors import ArgumentError, ConfigError, ShapeError

CHECKPOINTED = (
    "MoELayer: experts: torch's {what} would repeat them in backward without the parameters of this rank; wrap the "
    "layer, or use LayerOptions(checkpoint_experts=True)"
)
LOST = (
    "and may have given every rank the experts of rank 0; load them again, and use "
    "DistributedDataParallel(model) after parallelize(model), or replicate(model, ignored_modules=[layer.experts]), "
    "with process_group= instead of a slice of a mesh"
)
_REENTRANT = "CheckpointFunctionBackward"
"""The node of a checkpoint with ``use_reentrant=True``, of torch and of libraries that have copied it."""


def check_wrappers(experts: nn.Module) -> None:
    """Raise ConfigError if torch's wrapper repeats the experts, or a part of them, in backward. Local."""
    for part in experts.modules():
        # offload_wrapper is made of the same class, and repeats nothing.
        if "_checkpoint_wrapped_module" in part._modules and type(part).__name__ != "OffloadWrapper":
            raise ConfigError(CHECKPOINTED.format(what="checkpoint_wrapper"))


def check_graph(result: Tensor, rows: Tensor, values: Sequence[Tensor]) -> None:
    """Raise ConfigError if backward of what experts have returned would repeat a part that has parameters. Local.

    A checkpoint with ``use_reentrant=True`` would find their parameters as they are in the layer, and replicas would
    silently get different gradients. Those that are its arguments are in the graph, and right.

    Args:
        result: What the experts returned.
        rows: Those that they got.
        values: The parameters that they got.
    """
    ends = {get_gradient_edge(value).node for value in values if value.requires_grad}
    seen, waiting, repeats = {rows.grad_fn, None}, [result.grad_fn], False
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node not in ends:
            repeats = repeats or node.name() == _REENTRANT
            waiting += [before for before, _ in node.next_functions]
    if repeats and not ends <= seen:
        raise ConfigError(CHECKPOINTED.format(what="checkpoint(use_reentrant=True)"))


@not_compiled  # torch 2.11 cannot compile what raises our errors
def refuse_unequal(names: str) -> None:
    """Raise ConfigError, since these parameters or buffers may differ between ranks or slots with the same experts."""
    raise ConfigError(
        f"MoELayer: experts: {names} had no values when parallelize would have made the ranks and slots equal that "
        "hold the same expert; call parallelize(model) again, now that there are some"
    )


@not_compiled
def refuse_width(x: Tensor, hidden: int) -> None:
    """Raise ShapeError, since these are no rows of the group. Before the router, whose error would be torch's."""
    raise ShapeError(
        f"MoELayer: x: expected [..., H], got {list(x.shape)}; H={hidden} was set by the group: pass rows of {hidden} "
        "numbers"
    )


def check_transforms(weights: Iterable[Tensor]) -> None:
    """Raise ArgumentError where torch.func or torch.vmap would transform a part of a DTensor, which it cannot. Local.

    A layer whose gradients nobody asks for may stand inside of a transform of something else.
    """
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is None:
        return
    if torch.is_grad_enabled() or any(map(functorch.is_functorch_wrapped_tensor, weights)):
        raise ArgumentError(
            "MoELayer: experts: transforms of torch.func, and torch.vmap, do not work with experts that are spread "
            "over ranks; use torch.autograd.grad or .backward()"
        )


@not_compiled
def refuse_replaced(experts: nn.Module) -> None:
    """Raise ConfigError if experts have DTensors that are no parameters any more. Local.

    torch makes such of what it took for tensors of tensor parallelism.
    """
    for place, part in experts.named_modules():
        for name, value in vars(part).items():
            if hasattr(value, "device_mesh") and isinstance(value, Tensor):
                raise ConfigError(
                    f"MoELayer: experts: {place + '.' if place else ''}{name} is no parameter any more, since a tool "
                    f"has replaced it, as torch's replicate does with a slice of a mesh, {LOST}"
                )


@not_compiled
def refuse_late(name: str, parameter: Tensor) -> None:
    """Raise ConfigError, since a parameter is no DTensor, as it is if it came when the others had become some."""
    _check_plain(name, parameter)
    raise ConfigError(
        f"MoELayer: experts: {name} is no DTensor as the others are, since it came after the layer was made; register "
        "it before that, or call parallelize(model, mesh) afterwards"
    )


def _check_plain(name: str, parameter: Tensor) -> None:
    """Raise ConfigError for a plain parameter that was a DTensor: torch has noted there what it would make of it."""
    if hasattr(parameter, "_st_info"):
        raise ConfigError(f"MoELayer: experts: a tool has made plain tensors of them, such as {name}, {LOST}")


def buffers_by_expert(group: ExpertGroup, experts: nn.Module) -> dict[str, Tensor]:
    """Return the buffers with a row for each of the L experts of this rank, as parameters have it. Local."""
    found = experts.named_buffers()
    return {name: buffer for name, buffer in found if buffer.ndim > 0 and buffer.shape[0] == group.num_local_experts}


def check_experts(group: ExpertGroup, experts: nn.Module) -> None:
    """Raise ConfigError if a rank could not hold its own part of these experts, or could not save it. Local.

    Args:
        group: The group of the layer.
        experts: Modules whose parameters are DTensors of all experts, or this rank's part of them.
    """
    check_wrappers(experts)
    names = dict[nn.Parameter, str]()
    for name, parameter in experts.named_parameters(remove_duplicate=False):
        _check_plain(name, parameter)
        if names.setdefault(parameter, name) != name:
            raise ConfigError(
                f"MoELayer: experts: {names[parameter]} and {name} are one parameter; keep one of the names, and use "
                "it twice in forward"
            )
        count = group.shape.num_experts if hasattr(parameter, "to_local") else group.num_local_experts
        if parameter.ndim == 0 or parameter.shape[0] != count:
            raise ConfigError(
                f"MoELayer: experts: {name}: expected the L={count} experts of this rank as the first dimension, got "
                f"{list(parameter.shape)}; stack their parameters"
            )
        if parameter.device.type not in ("meta", group.device.type):
            raise ConfigError(
                f"MoELayer: experts: {name}: expected a parameter on {group.device} like the group, got "
                f"{parameter.device}; call .to({str(group.device)!r})"
            )
    # By identity, since torch's wrappers change names, or by name, since hooks of state dicts change values.
    values, known = {id(parameter) for parameter in names}, dict(experts.named_parameters(remove_duplicate=False))
    state = experts.state_dict(keep_vars=True)
    saved = {name for name, value in state.items() if id(value) not in values and name not in known}
    if saved:
        raise ConfigError(
            f"MoELayer: experts: expected no buffers in the state_dict, got {sorted(saved)}; of several ranks only "
            "one's would be saved: make them parameters, with the L experts of this rank as the first dimension, or "
            "register them with persistent=False; rebalance moves a row for each expert, [L, ...], and nothing else"
        )
