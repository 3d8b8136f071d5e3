"""Host half of the kernel dispatch_split; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.describe import describe

THREADS = 512

SPEC = describe(
    __file__,
    (
        ("topk_idx", "ptr:const u8"),
        ("table", "ptr:i32"),
        ("bases", "ptr:i32"),
        ("dst_counts", "ptr:i64"),
        ("headers", "ptr:u32"),
        ("came", "ptr:u32"),
        ("states", "ptr:u32"),
        ("host", "ptr:u32"),
        ("num_tokens", "u32"),
        ("num_states", "u32"),
        ("top_k", "u32"),
        ("num_experts", "u32"),
        ("all_ranks", "u32"),
        ("num_nodes", "u32"),
        ("node", "u32"),
        ("capacity", "u32"),
        ("max_nodes", "u32"),
    ),
    max_registers=40,
    max_threads=THREADS,
    static_smem=64,
    configs=({"wide": 0}, {"wide": 1}),
)


def smem_bytes(num_ranks: int, num_nodes: int) -> int:
    """Return the dynamic shared memory of a block: masks of 128 bits for each rank of the group and each node."""
    return 16 * (num_ranks + num_nodes)
