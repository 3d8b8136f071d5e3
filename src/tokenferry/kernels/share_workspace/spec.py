"""Host half of the kernel share_workspace; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.control_block import MAX_RANKS
from tokenferry.kernels.describe import describe

THREADS = 32 * MAX_RANKS

SPEC = describe(
    __file__,
    (
        ("masked_out", "ptr:u32"),
        ("sizes", "u32[4]"),
        ("offset", "u32"),
        ("mask_late", "u32"),
    ),
    max_registers=64,
    max_threads=THREADS,
    static_smem=16,
)
