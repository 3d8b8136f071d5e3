"""The kernel `place`: see the head of kernel.cuh."""
