"""DeepEP's V1 API on tokenferry: ``import tokenferry.compat.deep_ep as deep_ep``.

For programs with ``import deep_ep``: put the folder that ``tokenferry deep-ep-path`` prints on PYTHONPATH.
Importing is cheap, and needs neither a GPU nor a process group. `ElasticBuffer` (DeepEP 2) and `HybridEPBuffer` are
missing; programs that test for them with ``hasattr`` see that they are absent. The
arguments are described in `tokenferry.compat.deep_ep.buffer`.
"""

from __future__ import annotations

import torch

import tokenferry
from tokenferry.compat.deep_ep.buffer import Buffer
from tokenferry.compat.deep_ep.config import Config
from tokenferry.compat.deep_ep.utils.event import EventHandle, EventOverlap

topk_idx_t = torch.int64
"""Dtype of ``topk_idx`` in DeepEP; int32 works as well."""

__version__ = f"1.2.1+tokenferry.{tokenferry.__version__}"
"""The version of DeepEP whose API this is, and the version of tokenferry."""

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "__version__", "topk_idx_t"]
