"""The module of events in DeepEP."""

from tokenferry.compat.deep_ep.utils.event import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
