"""Host half of the kernel decode_unpack; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.describe import describe

THREADS = 512

SPEC = describe(
    __file__,
    (
        ("headers", "ptr:const u32"),
        ("states", "ptr:const u32"),
        ("records", "ptr:const u8"),
        ("ids", "ptr:i32"),
        ("weights", "ptr:float"),
        ("overflows", "ptr:u32"),
        ("epoch", "ptr:const i32"),
        ("since", "ptr:const u64"),
        ("num_states", "u32"),
        ("first_state", "u32"),
        ("chunks", "u32"),
        ("top_k", "u32"),
        ("num_nodes", "u32"),
        ("node", "u32"),
        ("segment", "u32"),
        ("record_units", "u32"),
        ("routing_at", "u32"),
    ),
    max_registers=64,
    max_threads=THREADS,
    static_smem=0,
)
