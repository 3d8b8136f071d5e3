"""The kernel across_clock; the head of kernel.cuh documents it."""
