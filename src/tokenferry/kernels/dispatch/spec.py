"""Host half of the kernel dispatch; kernel.cuh documents the kernel."""

from __future__ import annotations

from dataclasses import dataclass

from tokenferry.kernels.describe import describe

MAX_WARPS = 24
MAX_PIECE_BYTES = 8192
STAGES = 3
"""Number of buffers in a ring."""

SPEC = describe(
    __file__,
    (
        ("x", "ptr:const u8"),
        ("scale", "ptr:const u8"),
        ("weights", "ptr:const f32"),
        ("topk_idx", "ptr:const u8"),
        ("places", "ptr:const i32"),
        ("rows_out", "ptr:const i64"),
        ("rows_in", "ptr:const i64"),
        ("scale_row_stride", "i64"),
        ("scale_stride", "i64"),
        ("tokens", "ptr:const i32"),
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
    """How rows are cut into pieces, and the shared memory of a block into rings, one for each warp.

    Attributes:
        pieces: Number of pieces of a row.
        piece_bytes: Bytes of a piece; the last one may have fewer.
        pitch: Bytes from one buffer to the next.
        stages: Number of buffers in a ring.
        warps: Number of warps of a block; each has one ring.
        smem_bytes: Bytes of all rings of a block.
    """

    pieces: int
    piece_bytes: int
    pitch: int
    stages: int
    warps: int
    smem_bytes: int


def cut(row_bytes: int, bulk_scale_bytes: int, smem_bytes: int, *, max_warps: int = MAX_WARPS) -> Rings:
    """Cut rows into pieces of at most 8 KB, and shared memory into as many rings of 3 buffers as fit.

    Three buffers keep a load and a store of each warp in flight; more buffers, or larger pieces, measured no faster.

    Args:
        row_bytes: Bytes of a row.
        bulk_scale_bytes: Bytes of its scales that are copied like the row.
        smem_bytes: Most dynamic shared memory of a block.
        max_warps: Most warps of a block.
    """
    pieces = -(-row_bytes // MAX_PIECE_BYTES)
    piece_bytes = -(-row_bytes // pieces // 16) * 16
    # Bulk copies from and to shared memory are slower where a buffer does not begin at a multiple of 128.
    pitch = -(-(piece_bytes + bulk_scale_bytes) // 128) * 128
    warps = max(1, min(max_warps, smem_bytes // (STAGES * pitch)))
    return Rings(pieces, piece_bytes, pitch, STAGES, warps, warps * STAGES * pitch)
