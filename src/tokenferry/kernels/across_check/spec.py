"""Host half of the kernel across_check; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.describe import describe

THREADS = 256

SPEC = describe(
    __file__,
    (
        ("headers", "ptr:const u32"),
        ("epoch", "ptr:const i32"),
        ("since", "ptr:const u64"),
        ("goes", "ptr:const u32"),
        ("comes", "ptr:const u32"),
        ("states", "ptr:const u32"),
        ("src_counts", "ptr:const i64"),
        ("num_states", "u32"),
        ("first_state", "u32"),
        ("chunks", "u32"),
        ("skips", "u32"),
        ("num_nodes", "u32"),
        ("node", "u32"),
    ),
    max_registers=64,
    max_threads=THREADS,
    static_smem=0,
)
