"""The CPU backend: dispatch and combine by messages between processes."""
