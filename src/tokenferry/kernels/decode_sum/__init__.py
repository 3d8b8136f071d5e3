"""The kernel decode_sum; the head of kernel.cuh documents it."""
