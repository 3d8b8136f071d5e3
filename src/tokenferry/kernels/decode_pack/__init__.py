"""The kernel decode_pack; the head of kernel.cuh documents it."""
