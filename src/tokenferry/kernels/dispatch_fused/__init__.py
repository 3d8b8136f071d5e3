"""The kernel dispatch_fused; the head of kernel.cuh documents it."""
