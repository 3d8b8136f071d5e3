"""`EPBuffer` and its handle under their module path in DeepEP 2.5."""

from tokenferry.compat.deep_ep.elastic_handle import EPHandle
from tokenferry.compat.deep_ep.ep_buffer import EPBuffer

__all__ = ["EPBuffer", "EPHandle"]
