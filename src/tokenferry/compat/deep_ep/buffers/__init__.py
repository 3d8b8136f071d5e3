"""The package of buffers in DeepEP 2, for paths such as `deep_ep.buffers.legacy.Buffer`."""

from tokenferry.compat.deep_ep.buffers import elastic, ep, legacy

__all__ = ["elastic", "ep", "legacy"]
