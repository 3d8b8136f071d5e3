"""Host half of the kernel rail_receive; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.describe import describe
from tokenferry.kernels.network import NVSHMEM, linked

THREADS = 256

SPEC = linked(
    describe(
        __file__,
        (
            ("headers", "ptr:u32"),
            ("states", "ptr:u32"),
            ("bodies", "ptr:u8"),
            ("body_bytes", "u32"),
            ("skips", "u32"),
            ("waits", "u32"),
            ("num_nodes", "u32"),
            ("node", "u32"),
            ("region", "ptr:u8"),
            ("network", "ptr:const u64"),
            ("message_bytes", "u32"),
            ("max_chunks", "u32"),
            ("mask_late", "u32"),
            ("masked_out", "ptr:u32"),
        ),
        max_registers=64,
        max_threads=THREADS,
        static_smem=16,
    ),
    NVSHMEM,
)
