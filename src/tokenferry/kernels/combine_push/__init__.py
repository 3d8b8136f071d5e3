"""The kernel combine_push; the head of kernel.cuh documents it."""
