"""The package `deep_ep`, implemented by tokenferry."""

from tokenferry.compat.deep_ep import (
    Buffer,
    Config,
    ElasticBuffer,
    EPBuffer,
    EPHandle,
    EventHandle,
    EventOverlap,
    HybridEPBuffer,
    __version__,
    get_logical_domain_size,
    get_physical_domain_size,
    topk_idx_t,
)

__all__ = [
    "Buffer",
    "Config",
    "EPBuffer",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "HybridEPBuffer",
    "__version__",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "topk_idx_t",
]
