"""Host half of the kernel `unpack`; kernel.cuh says what it does."""

from __future__ import annotations

from tokenferry.kernels.describe import describe

THREADS = 512

SPEC = describe(
    __file__,
    (
        ("rows", "ptr"),
        ("scale", "ptr"),
        ("weights", "ptr"),
        ("row_idx", "ptr"),
        ("src_counts", "ptr"),
        ("expert_counts", "ptr"),
        ("num_delivered", "u64"),
        ("row_bytes", "u32"),
        ("scale_bytes", "u32"),
        ("top_k", "u32"),
        ("num_local", "u32"),
        ("alignment", "u32"),
        ("capacity", "u32"),
        ("zero", "u32"),
    ),
    max_registers=96,
    max_threads=THREADS,
    static_smem=0,
)
