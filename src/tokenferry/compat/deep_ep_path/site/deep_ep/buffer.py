"""The module path of `Buffer` in DeepEP 1."""

from tokenferry.compat.deep_ep.buffer import Buffer

__all__ = ["Buffer"]
