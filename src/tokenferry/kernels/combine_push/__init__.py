"""The kernel `push`: see the head of kernel.cuh."""
