"""tokenferry: carries each token of a Mixture-of-Experts layer to the ranks that hold its experts, and home again.

The public names; importing does nothing else: no process group, no CUDA, no files. Start with `ExpertGroup`; the legend
of letters is in `tokenferry.types`. Not imported here: `tokenferry.autograd` (differentiable calls), `tokenferry.nn` (a
complete layer and routers), `tokenferry.compat.deep_ep` (DeepEP's API), `tokenferry.formats.fp8` and
`tokenferry.formats.logfmt` (formats of few bits).
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
