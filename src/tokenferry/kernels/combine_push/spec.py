"""Host half of the kernel `push`; kernel.cuh says what it does."""

from __future__ import annotations

from tokenferry.kernels.combine_pull.spec import GROUP_ROWS, PIECE_BYTES, STAGES, SUM_FIELDS
from tokenferry.kernels.control_block import MAX_LANDED
from tokenferry.kernels.describe import TYPES, describe
from tokenferry.kernels.dispatch import spec as dispatch_spec

WARPS = 13
"""Of a block: 13 add up, or up to 12 push, and the last one tells peers."""

_ADDING_BYTES = WARPS * STAGES * GROUP_ROWS * PIECE_BYTES

SPEC = describe(
    __file__,
    (
        *SUM_FIELDS,
        ("source", "ptr"),
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
    """How a block that pushes cuts rows and shared memory; it takes no less than a block that adds up."""
    rings = dispatch_spec.cut(row_bytes, 0)
    warps = min(rings.warps, WARPS - 1)
    taken = warps * rings.stages * rings.pitch
    return dispatch_spec.Rings(
        rings.pieces, rings.piece_bytes, rings.pitch, rings.stages, warps, max(taken, _ADDING_BYTES)
    )


def unit_bits(num_tokens: int) -> int:
    """Rows of a unit, as a power of two: one, or as many as it takes to have a word for each unit."""
    return max(0, (max(num_tokens, 1) - 1).bit_length() - MAX_LANDED.bit_length() + 1)


def num_whole(num_tokens: int, pieces: int, num_adding: int) -> int:
    """Tokens that a warp adds up as a whole; of the last ones it takes single pieces, so that all end together."""
    return max(0, num_tokens - 2 * WARPS * num_adding // pieces)
