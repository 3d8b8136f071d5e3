"""Host half of the kernel decode_sum; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.codes import ROW_TYPES, TYPES
from tokenferry.kernels.decode_combine.spec import FP8, LOGFMT10
from tokenferry.kernels.describe import describe

THREADS = 512

SPEC = describe(
    __file__,
    (
        ("slots", "ptr:const i32"),
        ("own", "ptr:const u8"),
        ("parts", "ptr:const u8"),
        ("out", "ptr:int4"),
        ("num_tokens", "u32"),
        ("columns", "u32"),
        ("num_nodes", "u32"),
        ("node", "u32"),
    ),
    max_registers=80,
    max_threads=THREADS,
    static_smem=0,
    configs=tuple({"type": TYPES[dtype], "encoding": encoding} for dtype in ROW_TYPES for encoding in (FP8, LOGFMT10)),
)
