"""tokenferry: expert-parallel dispatch and combine for Mixture-of-Experts models.

This module exports the public names. Importing it does not initialise a process group or CUDA, opens no file, and does
not import torch: the first use of a name does. Start with `ExpertGroup`. `tokenferry.types` defines the letters used in
all docstrings, and a type for each option that takes one of a few strings (such as `tokenferry.types.Numerics`). Import
by name: `tokenferry.autograd` (differentiable calls), `tokenferry.nn` (a complete layer and routers),
`tokenferry.compat.deep_ep` (DeepEP's API), `tokenferry.formats.fp8` and `tokenferry.formats.logfmt` (low-precision
number formats).
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


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any of the public names, or a module
    """Import what defines the public names when one of them, or one of these modules, is first used."""
    if name not in __all__ and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = [importlib.import_module(f"tokenferry.{module}") for module in _MODULES]
    names = globals()
    for public in __all__:
        names[public] = next(getattr(module, public) for module in modules if hasattr(module, public))
    return names[name]


def __dir__() -> list[str]:
    """Return all names, those that were not used yet included."""
    return sorted({*globals(), *__all__})
