"""The kernel `unpack`: see the head of kernel.cuh."""
