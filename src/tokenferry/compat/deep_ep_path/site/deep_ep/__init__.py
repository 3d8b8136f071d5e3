"""The package `deep_ep`, implemented by tokenferry."""

from tokenferry.compat.deep_ep import Buffer, Config, EventHandle, EventOverlap, __version__, topk_idx_t

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "__version__", "topk_idx_t"]
