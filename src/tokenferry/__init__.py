"""tokenferry: expert-parallel dispatch and combine for Mixture-of-Experts models.

This module exports the public names. Importing it does not initialise a process group or CUDA, and opens no file. Start
with `ExpertGroup`. `tokenferry.types` defines the letters used in all docstrings, and a type for each option that takes
one of a few strings (such as `tokenferry.types.Numerics`). Import by name: `tokenferry.autograd` (differentiable
calls), `tokenferry.nn` (a complete layer and routers), `tokenferry.compat.deep_ep` (DeepEP's API),
`tokenferry.formats.fp8` and `tokenferry.formats.logfmt` (low-precision number formats).
"""

from __future__ import annotations

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
