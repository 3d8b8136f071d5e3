"""Host half of the kernel across_open; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.codes import RAIL_CHUNKS
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
        ("cut_node", "u32"),
        ("chunk_first", f"u32[{RAIL_CHUNKS}]"),
        ("num_nodes", "u32"),
        ("node", "u32"),
    ),
    max_registers=40,
    max_threads=THREADS,
    static_smem=0,
)
