"""The package from which clients of DeepEP import its events."""

from tokenferry.compat.deep_ep.utils.event import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
