"""Host half of the kernel `stage`; kernel.cuh says what it does."""

from __future__ import annotations

from tokenferry.kernels.describe import describe

THREADS = 512

SPEC = describe(
    __file__,
    (
        ("source", "ptr"),
        ("to", "ptr"),
        ("expert_counts", "ptr"),
        ("src_counts", "ptr"),
        ("num_local", "u32"),
        ("capacity", "u32"),
        ("row_bytes", "u32"),
    ),
    max_registers=64,
    max_threads=THREADS,
    static_smem=0,
)
