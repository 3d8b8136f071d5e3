"""The module path of `HybridEPBuffer` in DeepEP's hybrid branch."""

from tokenferry.compat.deep_ep.hybrid_ep_buffer import HybridEPBuffer, indices_to_map

__all__ = ["HybridEPBuffer", "indices_to_map"]
