"""Layers that share experts or a router, whose experts can only be moved together."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import Tensor

from tokenferry.errors import ConfigError
from tokenferry.nn.expert_checks import buffers_by_expert
from tokenferry.nn.wrappers import unwrapped

if TYPE_CHECKING:
    from tokenferry.nn.layer import MoELayer

_layers: weakref.WeakSet[MoELayer] = weakref.WeakSet()


def remember(layer: MoELayer) -> None:
    """Make a layer known to `layers`, for as long as it lives."""
    _layers.add(layer)


def layers() -> list[MoELayer]:
    """Return the layers of this process, in any order."""
    return list(_layers)


def check_sharers(layer: MoELayer) -> None:
    """Raise ConfigError if another layer would be spoiled by moving the experts of this one. Local.

    It has some of its experts and another router, or its router and other experts. One that has both goes along.
    """
    mine, router = _moved(layer), unwrapped(layer.router)
    for other in layers():
        theirs, same_router = _moved(other), unwrapped(other.router) is router
        wanted = mine | theirs if same_router else set()
        if other is not layer and mine & theirs != wanted:
            shared, own = ("router", "experts") if same_router else ("experts", "a router")
            raise ConfigError(
                f"rebalance: layer: another MoELayer shares its {shared}, and would be wrong afterwards, since it has "
                f"{own} of its own; let the layers share both, or neither"
            )


def _moved(layer: MoELayer) -> set[Tensor]:
    """Return what moves with the experts of a layer.

    With one expert on each rank nobody can tell a buffer [1, ...] that is the same for all: it moves, too.
    """
    return {*layer.expert_parameters(), *buffers_by_expert(layer.group, layer.experts).values()}
