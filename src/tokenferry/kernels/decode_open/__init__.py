"""The kernel decode_open; the head of kernel.cuh documents it."""
