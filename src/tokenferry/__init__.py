"""tokenferry: expert-parallel dispatch and combine for Mixture-of-Experts models.

This module exports the public names. Importing it does not initialise a process group or CUDA, opens no file, and does
not import torch: the first use of a name does. Start with `ExpertGroup`. `tokenferry.types` defines the letters used in
all docstrings, and a type for each option that takes one of a few strings (such as `tokenferry.types.Numerics`).

Packages beside it, imported when they are first used, by ``import`` or as attributes of this module:

- `tokenferry.autograd`: the calls with gradients
- `tokenferry.nn`: a complete layer, routers and experts; `tokenferry.nn.balance`: places and replicas of experts
- `tokenferry.formats`: low-precision formats of rows, `fp8` and `logfmt`
- `tokenferry.compat.deep_ep`: DeepEP's API
- `tokenferry.integrations`: plug-ins of transformers, vLLM and SGLang
- `tokenferry.cost`: a model of the cost of calls across nodes
- `tokenferry.testing`: ranks on this host, `world`, and the results that calls must have, `oracle`
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenferry.api import ExpertGroup
    from tokenferry.errors import (
        ArgumentError,
        BackendUnavailable,
        CapacityError,
        ClosedError,
        ConfigError,
        MismatchError,
        PeerTimeout,
        PickleError,
        PlanError,
        ResourceError,
        RoutingError,
        ShapeError,
        TokenferryError,
        UnsupportedError,
    )
    from tokenferry.topology import Topology
    from tokenferry.types import (
        Combined,
        DecodeCombined,
        DecodeDispatched,
        DecodePlan,
        DecodeStats,
        Dispatched,
        DispatchOptions,
        Layout,
        MoeShape,
        Plan,
        Quantized,
        Routing,
        Scale,
    )

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BackendUnavailable",
    "CapacityError",
    "ClosedError",
    "Combined",
    "ConfigError",
    "DecodeCombined",
    "DecodeDispatched",
    "DecodePlan",
    "DecodeStats",
    "DispatchOptions",
    "Dispatched",
    "ExpertGroup",
    "Layout",
    "MismatchError",
    "MoeShape",
    "PeerTimeout",
    "PickleError",
    "Plan",
    "PlanError",
    "Quantized",
    "ResourceError",
    "Routing",
    "RoutingError",
    "Scale",
    "ShapeError",
    "TokenferryError",
    "Topology",
    "UnsupportedError",
]

_MODULES = ("api", "errors", "topology", "types")

_PACKAGES = {
    "autograd": (),
    "compat": ("deep_ep",),
    "cost": ("calls", "case", "estimate", "reach", "rows"),
    "formats": ("fp8", "logfmt"),
    "integrations": ("transformers",),
    "nn": ("balance",),
    "testing": ("oracle", "world"),
}
"""Packages, and what documents name of each."""


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any of the public names, or a module
    """Import what defines the public names when one of them, or one of these modules, is first used."""
    if name in _PACKAGES:
        for module in _PACKAGES[name]:
            importlib.import_module(f"tokenferry.{name}.{module}")
        return importlib.import_module(f"tokenferry.{name}")
    if name not in __all__ and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = [importlib.import_module(f"tokenferry.{module}") for module in _MODULES]
    names = globals()
    for public in __all__:
        names[public] = next(getattr(module, public) for module in modules if hasattr(module, public))
    return names[name]


def __dir__() -> list[str]:
    """Return all names, those that were not used yet included."""
    return sorted({*globals(), *__all__, *_PACKAGES})
