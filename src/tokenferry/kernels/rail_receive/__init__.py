"""The kernel rail_receive; the head of kernel.cuh documents it."""
