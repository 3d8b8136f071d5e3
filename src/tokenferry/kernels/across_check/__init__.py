"""The kernel across_check; the head of kernel.cuh documents it."""
