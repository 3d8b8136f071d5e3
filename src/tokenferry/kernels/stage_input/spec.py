"""Host half of the kernel stage_input; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.describe import describe

THREADS = 512

SPEC = describe(
    __file__,
    (
        ("source", "ptr:const u8"),
        ("to", "ptr:u8"),
        ("expert_counts", "ptr:const i32"),
        ("src_counts", "ptr:const i64"),
        ("num_local", "u32"),
        ("capacity", "u32"),
        ("row_bytes", "u32"),
    ),
    max_registers=64,
    max_threads=THREADS,
    static_smem=0,
)
