"""`ElasticBuffer` and its handle under their module path in DeepEP 2."""

from tokenferry.compat.deep_ep.elastic import ElasticBuffer
from tokenferry.compat.deep_ep.elastic_handle import EPHandle

__all__ = ["EPHandle", "ElasticBuffer"]
