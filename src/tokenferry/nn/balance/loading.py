"""State dicts of placed layers: experts and the slots that they belong to are loaded together, or neither."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenferry.errors import ConfigError
from tokenferry.nn.balance.routing import PlacedRouter
from tokenferry.nn.wrappers import key_inside, unwrapped

if TYPE_CHECKING:
    from tokenferry.nn.layer import MoELayer


def refuse_half_state(layer: MoELayer, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Raise ConfigError if a state dict would bring experts without their slots, or slots without their experts. Local.

    As a partial state does with ``strict=False``, or of the parameters that are trained. A hook of
    ``load_state_dict``: nothing of the layer has been loaded when it raises. Experts on the meta device have no values
    that could be in the wrong slots.
    """
    router, place = unwrapped(layer.router), f"{prefix}router.{key_inside(layer.router)}_extra_state"
    weights: dict[str, Any] = dict(layer.experts.named_parameters())
    begin, slots = f"{prefix}experts.", state.get(place)
    if any(key.startswith(begin) and key[len(begin) :] not in weights for key in state):
        return  # parts of the experts may know these names, and give them others when they are loaded
    if isinstance(router, PlacedRouter) and isinstance(slots, Tensor) and slots.shape != router._slots.shape:
        return  # the router says what is wrong
    slots = slots if isinstance(slots, Tensor) else None  # such as the mark of torch where a full state has none
    if not isinstance(router, PlacedRouter):
        _refuse_slots_without_router(layer, place, slots, any(begin + name in state for name in weights))
        return
    given = {name: state.get(begin + name) for name in weights}
    fresh = [name for name, value in given.items() if value is not None and value is not weights[name]]
    found = None if slots is None else slots.tolist()
    if found is None and fresh:
        _refuse_experts_without_slots(router, begin, place)
    in_place = _is_same_memory(slots, router._slots)
    # torch completes a full state by the layer's own parameters. But own DTensors it may have loaded already.
    own = {name for name in given if name not in fresh and not in_place and not hasattr(weights[name], "to_local")}
    absent = [name for name, value in given.items() if value is None or name in own]
    current = router._placed.tolist()
    if found is None or found == current or not absent or any(weights[name].is_meta for name in absent):
        return
    if in_place:  # the router would follow what was written to its own tensor
        with torch.no_grad():
            router._slots.copy_(router._placed)
    raise ConfigError(
        f"MoELayer: load_state_dict: {place} says that the slots hold the experts {found}, this layer has {current}, "
        f"and {begin}{absent[0]} is not in the state; load all of the experts with it, or first move those of the "
        f"layer: rebalance(layer, Placement.of(torch.tensor({found}), num_ranks={layer.group.num_ranks}))"
    )


def _refuse_experts_without_slots(router: PlacedRouter, begin: str, place: str) -> None:
    """Raise ConfigError unless the layer has its experts in their order, as states without slots have them."""
    current = router._current().physical_to_logical.tolist()
    if current != list(range(len(current))):
        raise ConfigError(
            f"MoELayer: load_state_dict: the state has {begin}* but not {place}, which says what slots they belong to, "
            f"and this layer has the experts {current} in its slots; load both. If the state has its experts in these "
            f"slots, too, put {place} = layer.router.placement.physical_to_logical into it"
        )


def _refuse_slots_without_router(layer: MoELayer, place: str, slots: Tensor | None, has_experts: bool) -> None:
    """Raise ConfigError if the experts of a placed layer would come into one that sends tokens by their numbers."""
    if slots is None or not has_experts or slots.shape != (layer.group.shape.num_experts,) or slots.is_meta:
        return
    if getattr(type(unwrapped(layer.router)), "set_extra_state", None) not in (None, torch.nn.Module.set_extra_state):
        return  # it is the router's own
    found = slots.tolist()
    if found != list(range(len(found))):
        raise ConfigError(
            f"MoELayer: load_state_dict: {place} says that the slots hold the experts {found}, and this layer has them "
            "in the order of their numbers; make it with a PlacedRouter, or rebalance the layer before it is saved"
        )


def _is_same_memory(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
