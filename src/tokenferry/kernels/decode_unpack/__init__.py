"""The kernel decode_unpack; the head of kernel.cuh documents it."""
