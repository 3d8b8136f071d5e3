"""The module path of `ElasticBuffer` in DeepEP 2."""

from tokenferry.compat.deep_ep.buffers.elastic import ElasticBuffer, EPHandle

__all__ = ["EPHandle", "ElasticBuffer"]
