"""DeepEP 1's path of `Buffer`."""

from tokenferry.compat.deep_ep.buffer import Buffer

__all__ = ["Buffer"]
