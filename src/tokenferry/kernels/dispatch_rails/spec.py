"""Host half of the kernel dispatch_rails; kernel.cuh documents the kernel."""

from __future__ import annotations

from dataclasses import replace

from tokenferry.kernels.describe import describe

THREADS = 512

SPEC = replace(
    describe(
        __file__,
        (
            ("topk_idx", "ptr:const u8"),
            ("table", "ptr:const i32"),
            ("bases", "ptr:const i32"),
            ("mine", "ptr:const u32"),
            ("came", "ptr:const u32"),
            ("dst_counts", "ptr:const i64"),
            ("slots", "ptr:i32"),
            ("ids", "ptr:u8"),
            ("parcels_out", "ptr:u8"),
            ("dst_token", "ptr:i64"),
            ("num_tokens", "u32"),
            ("segment", "u32"),
            ("top_k", "u32"),
            ("num_experts", "u32"),
            ("all_ranks", "u32"),
            ("num_nodes", "u32"),
            ("node", "u32"),
            ("apart", "u32"),
        ),
        max_registers=48,
        max_threads=THREADS,
        static_smem=64,
        configs=({"wide": 0}, {"wide": 1}),
    ),
    other_registers=56,
)
