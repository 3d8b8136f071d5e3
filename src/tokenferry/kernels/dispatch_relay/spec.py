"""Host half of the kernel dispatch_relay; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.describe import describe

THREADS = 256

SPEC = describe(
    __file__,
    (
        ("parcels_in", "ptr:u8"),
        ("headers", "ptr:const u32"),
        ("mine", "ptr:const u32"),
        ("ids", "ptr:u8"),
        ("tokens", "ptr:i32"),
        ("sizes", "ptr:u32"),
        ("dst_counts", "ptr:const i64"),
        ("num_tokens", "u32"),
        ("segment", "u32"),
        ("epoch", "ptr:const i32"),
        ("host", "ptr:u32"),
        ("top_k", "u32"),
        ("apart", "u32"),
        ("capacity", "u32"),
        ("num_nodes", "u32"),
        ("node", "u32"),
    ),
    max_registers=64,
    max_threads=THREADS,
    static_smem=0,
    configs=({"wide": 0}, {"wide": 1}),
)
