"""DeepEP's path of events."""

from tokenferry.compat.deep_ep.utils import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
