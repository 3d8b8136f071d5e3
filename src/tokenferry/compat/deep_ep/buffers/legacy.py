"""`Buffer` under the name that DeepEP 2 gives to the V1 API."""

from tokenferry.compat.deep_ep.buffer import Buffer

__all__ = ["Buffer"]
