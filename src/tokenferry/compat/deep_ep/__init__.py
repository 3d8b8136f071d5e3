"""DeepEP's API on tokenferry: ``import tokenferry.compat.deep_ep as deep_ep``.

`Buffer` is that of DeepEP 1, which DeepEP 2 keeps as its legacy buffer; `ElasticBuffer` is that of DeepEP 2; `EPBuffer`
is that of DeepEP 2.5, which has neither of the others; `HybridEPBuffer` is that of a branch. For programs with
``import deep_ep``: put the folder that ``tokenferry deep-ep-path`` prints on PYTHONPATH. Importing is cheap, and needs
neither a GPU nor a process group. Methods that do not concern experts are missing; programs that test for them with
``hasattr`` see that they are absent. The arguments are described in the modules of the classes:
`tokenferry.compat.deep_ep.buffer`, `elastic`, `ep_buffer` and `hybrid`, beside it.
"""

from __future__ import annotations

import torch

import tokenferry
from tokenferry.compat.deep_ep import buffers as buffers
from tokenferry.compat.deep_ep import hybrid_ep_buffer as hybrid_ep_buffer
from tokenferry.compat.deep_ep import utils as utils
from tokenferry.compat.deep_ep.buffer import Buffer
from tokenferry.compat.deep_ep.config import Config
from tokenferry.compat.deep_ep.elastic import ElasticBuffer
from tokenferry.compat.deep_ep.elastic_handle import EPHandle
from tokenferry.compat.deep_ep.ep_buffer import EPBuffer
from tokenferry.compat.deep_ep.expert_buffer import get_logical_domain_size, get_physical_domain_size
from tokenferry.compat.deep_ep.hybrid import HybridEPBuffer
from tokenferry.compat.deep_ep.utils.event import EventHandle, EventOverlap

topk_idx_t = torch.int64
"""Dtype of ``topk_idx`` in DeepEP; int32 works as well."""

__version__ = f"2.1.0+tokenferry.{tokenferry.__version__}"
"""The version of DeepEP whose API this is, and the version of tokenferry."""

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
