"""Host half of the kernel across_open; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.describe import describe

THREADS = 256

SPEC = describe(
    __file__,
    (
        ("headers", "ptr:u32"),
        ("came", "ptr:u32"),
        ("states", "ptr:u32"),
        ("goes", "ptr:const u32"),
        ("comes", "ptr:const u32"),
        ("chunks", "u32"),
        ("chunk_tokens", "u32"),
        ("num_nodes", "u32"),
        ("node", "u32"),
    ),
    max_registers=40,
    max_threads=THREADS,
    static_smem=0,
)
