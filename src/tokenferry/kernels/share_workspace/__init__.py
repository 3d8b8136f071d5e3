"""The kernel share_workspace; the head of kernel.cuh documents it."""
