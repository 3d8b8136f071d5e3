"""Host half of the kernel across_clock; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.describe import describe

THREADS = 32

SPEC = describe(__file__, (("since", "ptr:u64"),), max_registers=32, max_threads=THREADS, static_smem=0)
