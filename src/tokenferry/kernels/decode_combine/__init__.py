"""The kernel of `decode_combine`."""
