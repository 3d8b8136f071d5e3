"""The kernel across_open; the head of kernel.cuh documents it."""
