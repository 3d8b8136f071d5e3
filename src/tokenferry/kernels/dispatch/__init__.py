"""The kernel dispatch; the head of kernel.cuh documents it."""
