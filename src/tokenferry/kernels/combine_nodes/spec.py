"""Host half of the kernel combine_nodes; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.codes import RAIL_CHUNKS, TYPES
from tokenferry.kernels.describe import describe

THREADS = 512

SPEC = describe(
    __file__,
    (
        ("slots", "ptr:const i32"),
        ("dst_counts", "ptr:const i64"),
        ("own", "ptr:const u8"),
        ("parts", "ptr:const u8"),
        ("own_weights", "ptr:const f32"),
        ("went", "ptr:const u32"),
        ("bias0", "ptr:const u8"),
        ("bias1", "ptr:const u8"),
        ("out", "ptr:u8"),
        ("weights_out", "ptr:f32"),
        ("num_tokens", "u32"),
        ("row_bytes", "u32"),
        ("top_k", "u32"),
        ("num_nodes", "u32"),
        ("node", "u32"),
        ("chunks", "u32"),
        ("cut_node", "u32"),
        ("chunk_first", f"u32[{RAIL_CHUNKS}]"),
        ("pitch", "u32"),
        ("skips", "u32"),
    ),
    max_registers=64,
    max_threads=THREADS,
    static_smem=0,
    configs=tuple({"type": kind} for kind in TYPES.values()),
)
