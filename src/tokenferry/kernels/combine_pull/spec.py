"""Host half of the kernel combine_pull; kernel.cuh documents the kernel."""

from __future__ import annotations

from dataclasses import replace

from tokenferry.kernels.codes import GROUP_ROWS, PIECE_BYTES, STAGES, TYPES
from tokenferry.kernels.describe import describe

MAX_WARPS = 12
WARP_BYTES = STAGES * GROUP_ROWS * PIECE_BYTES
"""Shared memory of a warp that sums."""

SUM_FIELDS = (
    ("table", "ptr:const i32"),
    ("places", "ptr:const i32"),
    ("out", "ptr:u8"),
    ("bias0", "ptr:const u8"),
    ("bias1", "ptr:const u8"),
    ("weights_out", "ptr:f32"),
    ("rows_out", "ptr:const i64"),
    ("rows_in", "ptr:const i64"),
    ("num_tokens", "u64"),
)
"""The fields that combine_pull and combine_push begin with: the sums, and the rows of which they are made."""

SPEC = replace(
    describe(
        __file__,
        (
            *SUM_FIELDS,
            ("row_bytes", "u32"),
            ("pieces", "u32"),
            ("width", "u32"),
            ("table_stride", "u32"),
            ("places_stride", "u32"),
            ("top_k", "u32"),
        ),
        max_registers=128,
        max_threads=MAX_WARPS * 32,
        static_smem=3072,
        configs=tuple({"type": kind} for kind in TYPES.values()),
    ),
    other_registers=152,
)


def num_warps(smem_bytes: int) -> int:
    """Return the warps of a block that may have so much dynamic shared memory."""
    return min(MAX_WARPS, smem_bytes // WARP_BYTES)
