"""The kernel combine_pull; the head of kernel.cuh documents it."""
