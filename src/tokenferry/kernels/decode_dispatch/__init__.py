"""The kernel `spread`: decode dispatch."""
