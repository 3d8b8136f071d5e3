"""Host half of the kernel dispatch_notify; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.codes import UNIT_TOKENS
from tokenferry.kernels.describe import describe

THREADS = 512
ONE_SEGMENT = 1 << 30
"""Units of a segment, if there is only one."""

SPEC = describe(
    __file__,
    (
        ("topk_idx", "ptr:const u8"),
        ("table", "ptr:i32"),
        ("bases", "ptr:i32"),
        ("dst_counts", "ptr:i64"),
        ("src_counts", "ptr:i64"),
        ("expert_counts", "ptr:i32"),
        ("expert_offsets", "ptr:i32"),
        ("sizes", "ptr:u32"),
        ("num_tokens", "u32"),
        ("host", "ptr:u32"),
        ("top_k", "u32"),
        ("num_experts", "u32"),
        ("layout", "u32"),
        ("alignment", "u32"),
        ("capacity", "u32"),
        ("row_limit", "u32"),
        ("segments", "u32"),
        ("segment_units", "u32"),
    ),
    max_registers=80,
    max_threads=THREADS,
    static_smem=2048,
    configs=({"wide": 0}, {"wide": 1}),
)


def num_units(num_tokens: int) -> int:
    """Return the number of units that T tokens make."""
    return -(-num_tokens // UNIT_TOKENS)


def smem_bytes(num_experts: int, num_ranks: int, segments: int = 1) -> int:
    """Return the dynamic shared memory of a block: masks of 128 bits for each expert and rank, then their totals."""
    columns = num_experts + num_ranks
    totals = segments * (columns + num_experts + num_ranks * num_ranks) + 2 * num_experts
    return max(columns * 16, totals * 4)


def most_experts(num_ranks: int, segments: int, dynamic_bytes: int) -> int:
    """Return the most experts whose masks and totals fit into so much dynamic shared memory; below 1 if none do."""
    masks = dynamic_bytes // 16 - num_ranks
    totals = (dynamic_bytes // 4 - segments * (num_ranks + num_ranks**2)) // (2 * segments + 2)
    return min(masks, totals)
