"""Host half of the kernel combine_push; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.codes import GROUP_ROWS, MAX_PUSH_STAGES, PIECE_BYTES, STAGES, TYPES
from tokenferry.kernels.combine_pull.spec import SUM_FIELDS
from tokenferry.kernels.control_block import MAX_LANDED
from tokenferry.kernels.describe import describe
from tokenferry.kernels.dispatch import spec as dispatch_spec

WARPS = 13
"""Warps of a block: 13 sum, or up to 12 push and the last one sets flags."""

_SUMMING_BYTES = WARPS * STAGES * GROUP_ROWS * PIECE_BYTES

SPEC = describe(
    __file__,
    (
        *SUM_FIELDS,
        ("source", "ptr:const u8"),
        ("pushers", "u32"),
        ("whole", "u32"),
        ("row_bytes", "u32"),
        ("pieces", "u32"),
        ("width", "u32"),
        ("table_stride", "u32"),
        ("places_stride", "u32"),
        ("top_k", "u32"),
        ("warps", "u32"),
        ("stages", "u32"),
        ("row_pieces", "u32"),
        ("piece_bytes", "u32"),
        ("pitch", "u32"),
    ),
    max_registers=128,
    max_threads=WARPS * 32,
    static_smem=4096,
    configs=tuple({"type": kind} for kind in TYPES.values()),
)


def cut(row_bytes: int) -> dispatch_spec.Rings:
    """Return how a pushing block cuts rows and shared memory; a summing block has the same memory."""
    rings = dispatch_spec.cut(row_bytes, 0)
    warps, stages = min(rings.warps, WARPS - 1), min(rings.stages, MAX_PUSH_STAGES)
    smem_bytes = max(warps * stages * rings.pitch, _SUMMING_BYTES)
    return dispatch_spec.Rings(rings.pieces, rings.piece_bytes, rings.pitch, stages, warps, smem_bytes)


def unit_bits(num_tokens: int) -> int:
    """Return the log2 of the rows of a unit: the least that leaves no more units than flags."""
    return max(0, (max(num_tokens, 1) - 1).bit_length() - MAX_LANDED.bit_length() + 1)


def num_whole(num_tokens: int, pieces: int, num_adding: int) -> int:
    """Return how many tokens are summed as a whole; the last ones are summed by piece, so that warps end together."""
    return max(0, num_tokens - 2 * WARPS * num_adding // pieces)
