"""DeepEP 2's path of the V1 `Buffer`."""

from tokenferry.compat.deep_ep.buffer import Buffer

__all__ = ["Buffer"]
