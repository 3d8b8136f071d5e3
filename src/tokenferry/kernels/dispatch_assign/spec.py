"""Host half of the kernel `place`; kernel.cuh says what it does."""

from __future__ import annotations

from tokenferry.kernels.describe import describe

THREADS = 512

SPEC = describe(
    __file__,
    (
        ("topk_idx", "ptr"),
        ("table", "ptr"),
        ("bases", "ptr"),
        ("dst_counts", "ptr"),
        ("places", "ptr"),
        ("dst_token", "ptr"),
        ("num_tokens", "u64"),
        ("top_k", "u32"),
        ("num_experts", "u32"),
        ("by_expert", "u32"),
    ),
    max_registers=40,
    max_threads=THREADS,
    static_smem=64,
    configs=({"wide": 0}, {"wide": 1}),
)


def num_columns(num_ranks: int, top_k: int, *, by_expert: bool) -> int:
    """Columns of ``places``: send and slot, and for layouts by expert row and pull."""
    return (num_ranks + top_k) * (2 if by_expert else 1)
