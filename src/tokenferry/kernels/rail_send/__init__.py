"""The kernel rail_send; the head of kernel.cuh documents it."""
