"""The kernel dispatch_rails; the head of kernel.cuh documents it."""
