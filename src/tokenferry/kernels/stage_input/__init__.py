"""The kernel `stage`: see the head of kernel.cuh."""
