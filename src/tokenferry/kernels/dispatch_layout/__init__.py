"""The kernel dispatch_layout; the head of kernel.cuh documents it."""
