"""The package of events in DeepEP."""

from deep_ep.utils import event as event  # type: ignore[import-not-found] # mypy looks for another one
from tokenferry.compat.deep_ep.utils import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
