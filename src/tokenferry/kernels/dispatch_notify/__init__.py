"""The kernel dispatch_notify; the head of kernel.cuh documents it."""
