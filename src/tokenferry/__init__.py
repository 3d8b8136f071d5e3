"""tokenferry: expert-parallel dispatch and combine for Mixture-of-Experts models.

This module defines the public names; importing it starts no process group, no CUDA, and opens no file. Begin with
`ExpertGroup`. `tokenferry.types` explains the letters of all docstrings, and has a type for each option that is one of
a few strings (`tokenferry.types.Numerics` and the like). Import by name: `tokenferry.autograd` (differentiable calls),
`tokenferry.nn` (a complete layer and routers), `tokenferry.compat.deep_ep` (DeepEP's API), `tokenferry.formats.fp8` and
`tokenferry.formats.logfmt` (number formats of few bits).
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
    PlanError,
    RoutingError,
    ShapeError,
    TokenferryError,
    UnsupportedError,
)
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
    "Plan",
    "PlanError",
    "Quantized",
    "Routing",
    "RoutingError",
    "Scale",
    "ShapeError",
    "TokenferryError",
    "UnsupportedError",
]
