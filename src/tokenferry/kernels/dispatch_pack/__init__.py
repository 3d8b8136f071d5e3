"""The kernel dispatch_pack; the head of kernel.cuh documents it."""
