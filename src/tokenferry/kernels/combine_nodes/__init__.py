"""The kernel combine_nodes; the head of kernel.cuh documents it."""
