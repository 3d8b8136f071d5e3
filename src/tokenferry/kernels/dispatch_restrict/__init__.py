"""The kernel dispatch_restrict; the head of kernel.cuh documents it."""
