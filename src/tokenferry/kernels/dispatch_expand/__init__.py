"""The kernel dispatch_expand; the head of kernel.cuh documents it."""
