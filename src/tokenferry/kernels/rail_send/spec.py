"""Host half of the kernel rail_send; kernel.cuh documents the kernel."""

from __future__ import annotations

from dataclasses import replace

from tokenferry.kernels.control_block import RAIL_CHUNK_BYTES
from tokenferry.kernels.describe import describe
from tokenferry.kernels.network import NVSHMEM, linked

THREADS = 256

SPEC = replace(
    linked(
        describe(
            __file__,
            (
                ("headers", "ptr:const u32"),
                ("bodies", "ptr:u8"),
                ("body_bytes", "u32"),
                ("skips", "u32"),
                ("num_nodes", "u32"),
                ("node", "u32"),
                ("region", "ptr:u8"),
                ("network", "ptr:const u64"),
                ("message_bytes", "u32"),
                ("max_chunks", "u32"),
            ),
            max_registers=64,
            max_threads=THREADS,
            static_smem=RAIL_CHUNK_BYTES + 16,
        ),
        NVSHMEM,
    ),
    other_registers=80,
)
