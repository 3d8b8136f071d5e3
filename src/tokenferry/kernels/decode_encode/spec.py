"""Host half of the kernel decode_encode; kernel.cuh documents the kernel."""

from __future__ import annotations

from tokenferry.kernels.codes import ROW_TYPES, TYPES
from tokenferry.kernels.decode_combine.spec import FP8, LOGFMT10
from tokenferry.kernels.describe import describe

THREADS = 512

SPEC = describe(
    __file__,
    (
        ("rows", "ptr:const int4"),
        ("packets", "ptr:u8"),
        ("num_rows", "u32"),
        ("columns", "u32"),
    ),
    max_registers=80,
    max_threads=THREADS,
    static_smem=0,
    configs=tuple({"type": TYPES[dtype], "encoding": encoding} for dtype in ROW_TYPES for encoding in (FP8, LOGFMT10)),
)
