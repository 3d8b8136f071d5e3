"""Host half of the kernel dispatch_assign; kernel.cuh documents the kernel."""

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
            ("dst_counts", "ptr:const i64"),
            ("places", "ptr:i32"),
            ("dst_token", "ptr:i64"),
            ("num_tokens", "u64"),
            ("top_k", "u32"),
            ("num_experts", "u32"),
            ("by_expert", "u32"),
            ("segments", "u32"),
            ("segment_units", "u32"),
        ),
        max_registers=40,
        max_threads=THREADS,
        static_smem=64,
        configs=({"wide": 0}, {"wide": 1}),
    ),
    other_registers=64,
)


def num_columns(num_ranks: int, top_k: int, *, by_expert: bool) -> int:
    """Return the number of columns of ``places``: send and slot, and for layouts by expert also row and pull."""
    return (num_ranks + top_k) * (2 if by_expert else 1)
