"""Host half of the kernel `move`; kernel.cuh says what it does."""

from __future__ import annotations

from dataclasses import dataclass

from tokenferry.kernels.describe import describe

MAX_WARPS = 24
MAX_PIECE_BYTES = 8192
SMEM_BYTES = 224 * 1024
"""What the rings of a block may take together; Hopper has 227 KB a block."""

SPEC = describe(
    __file__,
    (
        ("x", "ptr"),
        ("scale", "ptr"),
        ("weights", "ptr"),
        ("topk_idx", "ptr"),
        ("places", "ptr"),
        ("rows_out", "ptr"),
        ("rows_in", "ptr"),
        ("scale_row_stride", "i64"),
        ("scale_stride", "i64"),
        ("num_tokens", "u32"),
        ("row_bytes", "u32"),
        ("piece_bytes", "u32"),
        ("pitch", "u32"),
        ("pieces", "u32"),
        ("stages", "u32"),
        ("bulk_scale_bytes", "u32"),
        ("small_scale", "u32"),
        ("scale_size", "u32"),
        ("num_scales", "u32"),
        ("top_k", "u32"),
        ("width", "u32"),
        ("num_local", "u32"),
        ("by_expert", "u32"),
        ("wide", "u32"),
    ),
    max_registers=64,
    max_threads=MAX_WARPS * 32,
    static_smem=3072,
)


@dataclass(frozen=True, slots=True)
class Rings:
    """How a block's shared memory is cut into rings.

    Attributes:
        pieces: Pieces of a row.
        piece_bytes: Of each but perhaps the last.
        pitch: Bytes from buffer to buffer.
        stages: Buffers of a ring.
        warps: Rings of a block.
        smem_bytes: All rings of a block.
    """

    pieces: int
    piece_bytes: int
    pitch: int
    stages: int
    warps: int
    smem_bytes: int


def cut(row_bytes: int, bulk_scale_bytes: int) -> Rings:
    """Cut rows into pieces of at most 8 KB, and shared memory into rings of 3 buffers, or as many as fit.

    Three buffers keep a load and a store of each warp in flight; more of them, or larger pieces, measured no faster.
    """
    pieces = -(-row_bytes // MAX_PIECE_BYTES)
    piece_bytes = -(-row_bytes // pieces // 16) * 16
    # Bulk copies from and to shared memory are slower where a buffer does not begin at a multiple of 128.
    pitch = -(-(piece_bytes + bulk_scale_bytes) // 128) * 128
    stages = 3
    warps = max(1, min(MAX_WARPS, SMEM_BYTES // (stages * pitch)))
    return Rings(pieces, piece_bytes, pitch, stages, warps, warps * stages * pitch)
