"""Shared by tests, benchmarks and the demo: an oracle of plain loops, cases, and ranks to run them on."""

__all__ = ["oracle", "world"]
