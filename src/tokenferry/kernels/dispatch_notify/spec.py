"""Host half of the kernel `count`; kernel.cuh says what it does."""

from __future__ import annotations

from tokenferry.kernels.describe import describe

THREADS = 512
UNIT_TOKENS = 128
HOST_WORDS_BEFORE_EXPERTS = 1 + 2 * 8
"""``host``: the ticket, rows from each of 8 ranks, rows to each of 8 ranks, rows of each local expert."""

SPEC = describe(
    __file__,
    (
        ("topk_idx", "ptr"),
        ("table", "ptr"),
        ("bases", "ptr"),
        ("dst_counts", "ptr"),
        ("src_counts", "ptr"),
        ("expert_counts", "ptr"),
        ("expert_offsets", "ptr"),
        ("src_expert", "ptr"),
        ("host", "ptr"),
        ("num_tokens", "u32"),
        ("top_k", "u32"),
        ("num_experts", "u32"),
        ("layout", "u32"),
        ("alignment", "u32"),
        ("capacity", "u32"),
        ("room", "u32"),
    ),
    max_registers=80,
    max_threads=THREADS,
    static_smem=2048,
    configs=({"wide": 0}, {"wide": 1}),
)


def num_units(num_tokens: int) -> int:
    """Units that T tokens make."""
    return -(-num_tokens // UNIT_TOKENS)


def smem_bytes(num_experts: int, num_ranks: int) -> int:
    """Dynamic shared memory: a mask of 128 bits per expert and rank."""
    return (num_experts + num_ranks) * 16
