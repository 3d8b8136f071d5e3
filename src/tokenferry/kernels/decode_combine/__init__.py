"""The kernel `collect`: decode combine."""
