"""The kernel dispatch_split; the head of kernel.cuh documents it."""
