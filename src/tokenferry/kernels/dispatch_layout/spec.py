"""Host half of the kernel dispatch_layout; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.describe import describe

THREADS = 512
MAX_BLOCKS = 32
"""Blocks of a launch: each adds to the same counters, and has to be worth its start."""

SPEC = describe(
    __file__,
    (
        ("topk_idx", "ptr:const u8"),
        ("counts", "ptr:i32"),
        ("in_rank", "ptr:u8"),
        ("num_tokens", "u32"),
        ("top_k", "u32"),
        ("num_experts", "u32"),
        ("num_nodes", "u32"),
    ),
    max_registers=32,
    max_threads=THREADS,
    static_smem=16,
    configs=({"wide": 0}, {"wide": 1}),
)


def smem_bytes(num_experts: int, num_ranks: int) -> int:
    """Return the dynamic shared memory of a block: masks of 128 bits for each expert and rank; R: of all nodes."""
    return 16 * (num_experts + num_ranks)
