"""The kernel `pull`: see the head of kernel.cuh."""
