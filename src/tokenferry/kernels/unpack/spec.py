"""Host half of the kernel `unpack`; kernel.cuh says what it does."""

from __future__ import annotations

from pathlib import Path

from tokenferry.jit.kernel import KernelSpec
from tokenferry.jit.params import Params
from tokenferry.kernels.board import COMMON

THREADS = 512

PARAMS = Params(
    "UnpackParams",
    (
        *COMMON,
        ("rows", "ptr"),
        ("scale", "ptr"),
        ("weights", "ptr"),
        ("row_idx", "ptr"),
        ("src_counts", "ptr"),
        ("expert_counts", "ptr"),
        ("num_delivered", "u64"),
        ("row_bytes", "u32"),
        ("scale_bytes", "u32"),
        ("top_k", "u32"),
        ("num_local", "u32"),
        ("alignment", "u32"),
        ("capacity", "u32"),
        ("zero", "u32"),
    ),
)

SPEC = KernelSpec(
    name="unpack",
    source=Path(__file__).with_name("kernel.cuh"),
    include=Path(__file__).parents[1],
    params=PARAMS,
    max_registers=96,
    max_threads=THREADS,
    static_smem=0,
    configs=({},),
)
