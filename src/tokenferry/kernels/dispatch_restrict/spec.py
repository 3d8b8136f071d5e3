"""Host half of the kernel dispatch_restrict; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.describe import describe

THREADS = 512
MAX_BLOCKS = 64

SPEC = describe(
    __file__,
    (
        ("topk_idx", "ptr:const u8"),
        ("in_rank", "ptr:const u8"),
        ("kept", "ptr:u8"),
        ("num_tokens", "u32"),
        ("top_k", "u32"),
        ("num_experts", "u32"),
    ),
    max_registers=32,
    max_threads=THREADS,
    static_smem=0,
    configs=({"wide": 0}, {"wide": 1}),
)
