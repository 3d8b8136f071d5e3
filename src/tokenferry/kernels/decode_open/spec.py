"""Host half of the kernel decode_open; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.describe import describe

THREADS = 256

SPEC = describe(
    __file__,
    (
        ("headers", "ptr:u32"),
        ("came", "ptr:u32"),
        ("states", "ptr:u32"),
        ("epoch", "ptr:const i32"),
        ("slots", "ptr:const i32"),
        ("weights", "ptr:const float"),
        ("weights_here", "ptr:float"),
        ("weights_out", "ptr:float"),
        ("num_tokens", "u32"),
        ("top_k", "u32"),
        ("num_nodes", "u32"),
        ("node", "u32"),
    ),
    max_registers=64,
    max_threads=THREADS,
    static_smem=0,
)
