"""Host half of the kernel dispatch_expand; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.describe import describe

THREADS = 512

SPEC = describe(
    __file__,
    (
        ("rows", "ptr:u8"),
        ("scale", "ptr:u8"),
        ("weights", "ptr:f32"),
        ("row_idx", "ptr:const i64"),
        ("src_counts", "ptr:const i64"),
        ("expert_counts", "ptr:const i32"),
        ("num_delivered", "u64"),
        ("row_bytes", "u32"),
        ("scale_bytes", "u32"),
        ("top_k", "u32"),
        ("num_local", "u32"),
        ("alignment", "u32"),
        ("capacity", "u32"),
        ("zero", "u32"),
        ("num_sources", "u32"),
    ),
    max_registers=96,
    max_threads=THREADS,
    static_smem=0,
)
