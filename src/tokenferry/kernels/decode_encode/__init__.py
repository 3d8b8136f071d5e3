"""The kernel decode_encode; the head of kernel.cuh documents it."""
