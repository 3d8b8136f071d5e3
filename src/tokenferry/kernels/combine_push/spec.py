"""Host half of the kernel combine_push; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.codes import MAX_PUSH_STAGES, TYPES
from tokenferry.kernels.combine_pull import spec as pull_spec
from tokenferry.kernels.combine_pull.spec import SUM_FIELDS
from tokenferry.kernels.control_block import MAX_LANDED
from tokenferry.kernels.describe import describe
from tokenferry.kernels.dispatch import spec as dispatch_spec

MAX_WARPS = 13
"""Most warps of a block: 13 sum, or up to 12 push and the last one sets flags."""

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
    max_threads=MAX_WARPS * 32,
    static_smem=4096,
    configs=tuple({"type": kind} for kind in TYPES.values()),
)


def num_warps(smem_bytes: int) -> int:
    """Return the warps of a block, each of which sums in memory of its own; with so much dynamic shared memory."""
    return min(MAX_WARPS, smem_bytes // pull_spec.WARP_BYTES)


def cut(row_bytes: int, smem_bytes: int) -> dispatch_spec.Rings:
    """Return how a pushing block cuts rows and shared memory; a summing block has the same memory.

    Args:
        row_bytes: Bytes of a row.
        smem_bytes: Most dynamic shared memory of a block.
    """
    all_warps = num_warps(smem_bytes)
    rings = dispatch_spec.cut(row_bytes, 0, smem_bytes, max_warps=all_warps - 1)
    stages = min(rings.stages, MAX_PUSH_STAGES)
    used = max(rings.warps * stages * rings.pitch, all_warps * pull_spec.WARP_BYTES)
    return dispatch_spec.Rings(rings.pieces, rings.piece_bytes, rings.pitch, stages, rings.warps, used)


def unit_bits(num_tokens: int) -> int:
    """Return the log2 of the rows of a unit: the least that leaves no more units than flags."""
    return max(0, (max(num_tokens, 1) - 1).bit_length() - MAX_LANDED.bit_length() + 1)


def num_whole(num_tokens: int, pieces: int, num_adding: int) -> int:
    """Return how many tokens are summed as a whole; the last ones are summed by piece, so that warps end together.

    Args:
        num_tokens: T.
        pieces: Pieces of a row.
        num_adding: Warps that sum.
    """
    return max(0, num_tokens - 2 * num_adding // pieces)
