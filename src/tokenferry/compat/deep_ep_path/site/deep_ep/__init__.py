"""The package `deep_ep`, implemented by tokenferry."""

from deep_ep import buffer as buffer
from deep_ep import buffers as buffers
from deep_ep import hybrid_ep_buffer as hybrid_ep_buffer
from deep_ep import utils as utils
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
