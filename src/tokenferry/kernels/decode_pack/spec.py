"""Host half of the kernel decode_pack; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.codes import RAW, ROW_TYPES, TYPES
from tokenferry.kernels.decode_dispatch.spec import mask_words
from tokenferry.kernels.describe import describe

THREADS = 512

SPEC = describe(
    __file__,
    (
        ("x", "ptr:const int4"),
        ("topk_idx", "ptr:const void"),
        ("weights", "ptr:const float"),
        ("records", "ptr:u8"),
        ("slots", "ptr:i32"),
        ("number", "ptr:i32"),
        ("ids_here", "ptr:i32"),
        ("weights_here", "ptr:float"),
        ("headers", "ptr:u32"),
        ("came", "ptr:u32"),
        ("states", "ptr:u32"),
        ("overflows", "ptr:u32"),
        ("epoch", "ptr:const i32"),
        ("num_tokens", "u32"),
        ("top_k", "u32"),
        ("num_experts", "u32"),
        ("num_nodes", "u32"),
        ("node", "u32"),
        ("segment", "u32"),
        ("node_slots", "u32"),
        ("max_nodes", "u32"),
        ("columns", "u32"),
        ("row_units", "u32"),
        ("record_units", "u32"),
        ("routing_at", "u32"),
        ("scale_format", "u32"),
        ("wide", "u32"),
        ("weighted", "u32"),
    ),
    max_registers=64,
    max_threads=THREADS,
    static_smem=16,
    configs=tuple({"type": kind} for kind in (*(TYPES[dtype] for dtype in ROW_TYPES), RAW)),
)


def smem_bytes(max_tokens: int, num_nodes: int) -> int:
    """Return the dynamic shared memory of a block in bytes: two words for 32 tokens and a node, and one for a node."""
    return 4 * num_nodes * (2 * mask_words(max_tokens) + 1)


def most_tokens(num_nodes: int, dynamic_bytes: int) -> int:
    """Return the largest M for which a block needs no more dynamic shared memory than this."""
    return max(0, dynamic_bytes // (4 * num_nodes) - 1) // 2 * 32


def record_units(hidden: int, item_bytes: int, top_k: int, *, cast: bool, weighted: bool) -> int:
    """Return the units of 16 bytes of a record: a row, if it is cast its scales, and the routing."""
    return routing_at(hidden, item_bytes, cast=cast) // 16 + -(-(4 + top_k * (2 + 4 * weighted)) // 16)


def routing_at(hidden: int, item_bytes: int, *, cast: bool) -> int:
    """Return where the routing of a record begins, in bytes."""
    return hidden + 16 * -(-hidden // 512) if cast else hidden * item_bytes
