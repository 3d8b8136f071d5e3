"""Where DeepEP's clients look for its events."""

from tokenferry.compat.deep_ep.utils.event import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
