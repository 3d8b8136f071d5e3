"""The package of events in DeepEP."""

from tokenferry.compat.deep_ep.utils import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
