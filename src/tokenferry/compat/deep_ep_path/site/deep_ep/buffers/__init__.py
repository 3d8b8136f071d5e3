"""The package of buffers in DeepEP 2."""

from deep_ep.buffers import elastic, ep, legacy  # type: ignore[import-not-found] # mypy looks for another one

__all__ = ["elastic", "ep", "legacy"]
