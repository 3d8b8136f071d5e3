"""The module path of the V1 `Buffer` in DeepEP 2."""

from tokenferry.compat.deep_ep.buffer import Buffer

__all__ = ["Buffer"]
