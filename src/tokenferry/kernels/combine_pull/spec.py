"""Host half of the kernel `pull`; kernel.cuh says what it does."""

from __future__ import annotations

from tokenferry.kernels.describe import TYPES, describe

MAX_WARPS = 12
GROUP_ROWS = 4
STAGES = 2
PIECE_BYTES = 2048
SMEM_BYTES = MAX_WARPS * STAGES * GROUP_ROWS * PIECE_BYTES

SUM_FIELDS = (
    ("table", "ptr"),
    ("places", "ptr"),
    ("out", "ptr"),
    ("bias0", "ptr"),
    ("bias1", "ptr"),
    ("weights_out", "ptr"),
    ("rows_out", "ptr"),
    ("rows_in", "ptr"),
    ("num_tokens", "u64"),
)
"""What `pull` and `push` begin with: what is added up, and where to; the host packs them in one go."""

SPEC = describe(
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
)
