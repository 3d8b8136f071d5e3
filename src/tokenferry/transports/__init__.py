"""Transports: how the ranks of a CPU group send each other messages. They know bytes and calls, nothing of experts."""
