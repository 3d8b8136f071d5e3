"""The kernel `move`: see the head of kernel.cuh."""
