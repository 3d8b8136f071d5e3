"""The kernel dispatch_assign; the head of kernel.cuh documents it."""
