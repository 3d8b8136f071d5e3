"""The kernel of `decode_dispatch`."""
