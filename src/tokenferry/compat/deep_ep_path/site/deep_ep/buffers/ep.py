"""The module path of `EPBuffer` in DeepEP 2.5."""

from tokenferry.compat.deep_ep.buffers.ep import EPBuffer, EPHandle

__all__ = ["EPBuffer", "EPHandle"]
