"""Spec of the kernel `decode_combine`: params, configs and resources; kernel.cuh describes the kernel."""

from __future__ import annotations

from dataclasses import replace

from tokenferry.kernels.codes import ROW_TYPES, TYPES
from tokenferry.kernels.control_block import MAX_RANKS
from tokenferry.kernels.decode_words import (
    CHUNK_COLUMNS,
    ENCODING_FP8,
    ENCODING_LOGFMT10,
    ENCODING_SAME,
    FP8_PACKETS,
    LOGFMT10_PACKETS,
)
from tokenferry.kernels.describe import describe

THREADS = 512
SAME, FP8, LOGFMT10 = ENCODING_SAME, ENCODING_FP8, ENCODING_LOGFMT10
"""Values of the config ``encoding``: how rows are stored on the way."""

SPEC = replace(
    describe(
        __file__,
        (
            ("y", "ptr:const int4"),
            ("out", "ptr:int4"),
            ("topk_idx", "ptr:const void"),
            ("weights", "ptr:const float"),
            ("row_weights", "ptr:const float"),
            ("table", "ptr:const i32"),
            ("pending", "ptr:u32"),
            ("masked_out", "ptr:u32"),
            ("trace", "ptr:u64"),
            ("num_tokens", "u32"),
            ("phases", "u32"),
            ("workspaces", f"ptr[{MAX_RANKS}]"),
            ("packets_at", "u64"),
            ("packets_stride", "u64"),
            ("max_tokens", "u32"),
            ("top_k", "u32"),
            ("num_local", "u32"),
            ("columns", "u32"),
            ("wide", "u32"),
            ("mask_late", "u32"),
        ),
        max_registers=128,
        max_threads=THREADS,
        static_smem=256,
        configs=tuple(
            {"type": TYPES[dtype], "fast": fast, "encoding": encoding}
            for dtype in ROW_TYPES
            for fast in (0, 1)
            for encoding in (SAME, FP8, LOGFMT10)
        ),
    ),
    early=True,
    entry="low_latency::combine",
)


def packets_of_chunk(item_bytes: int, encoding: int) -> int:
    """Return the packets of 16 bytes that hold an encoded chunk."""
    return {SAME: CHUNK_COLUMNS * item_bytes // 16, FP8: FP8_PACKETS, LOGFMT10: LOGFMT10_PACKETS}[encoding]
