"""The kernel dispatch_relay; the head of kernel.cuh documents it."""
