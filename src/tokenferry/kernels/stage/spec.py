"""Host half of the kernel `stage`; kernel.cuh says what it does."""

from __future__ import annotations

from pathlib import Path

from tokenferry.jit.kernel import KernelSpec
from tokenferry.jit.params import Params
from tokenferry.kernels.board import COMMON

THREADS = 512

PARAMS = Params(
    "StageParams",
    (
        *COMMON,
        ("source", "ptr"),
        ("to", "ptr"),
        ("expert_counts", "ptr"),
        ("src_counts", "ptr"),
        ("num_local", "u32"),
        ("capacity", "u32"),
        ("row_bytes", "u32"),
    ),
)

SPEC = KernelSpec(
    name="stage",
    source=Path(__file__).with_name("kernel.cuh"),
    include=Path(__file__).parents[1],
    params=PARAMS,
    max_registers=64,
    max_threads=THREADS,
    static_smem=0,
    configs=({},),
)
