"""The kernel `count`: see the head of kernel.cuh."""
