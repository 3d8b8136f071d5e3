"""Host half of the kernel dispatch_pack; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.codes import RAIL_CHUNKS
from tokenferry.kernels.describe import describe

THREADS = 512

SPEC = describe(
    __file__,
    (
        ("x", "ptr:const u8"),
        ("scale", "ptr:const u8"),
        ("weights", "ptr:const f32"),
        ("slots", "ptr:const i32"),
        ("dst_counts", "ptr:const i64"),
        ("went", "ptr:const u32"),
        ("out", "ptr:u8"),
        ("scale_row_stride", "i64"),
        ("scale_stride", "i64"),
        ("num_tokens", "u32"),
        ("row_bytes", "u32"),
        ("bulk_scale_bytes", "u32"),
        ("scale_size", "u32"),
        ("num_scales", "u32"),
        ("top_k", "u32"),
        ("num_nodes", "u32"),
        ("node", "u32"),
        ("went_stride", "u32"),
        ("capacity", "u32"),
        ("chunks", "u32"),
        ("cut_node", "u32"),
        ("chunk_first", f"u32[{RAIL_CHUNKS}]"),
        ("pitch", "u32"),
    ),
    max_registers=80,
    max_threads=THREADS,
    static_smem=0,
)
