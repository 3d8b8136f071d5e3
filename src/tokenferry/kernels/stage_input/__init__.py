"""The kernel stage_input; the head of kernel.cuh documents it."""
