"""Host half of the kernels of kernel.cuh; `tokenferry.bench.suites.links` launches them."""

from __future__ import annotations

from pathlib import Path

from tokenferry.jit.kernel import KernelSpec
from tokenferry.jit.params import Params
from tokenferry.kernels import control_block
from tokenferry.kernels.control_block import MAX_RANKS
from tokenferry.kernels.header import Header

HEADER = Header("generated/link_limits.cuh", "kernels/link_limits/spec.py")
WORD_STRIDE = HEADER.constant("kWordStride", 128, "bytes: no two ranks poll or write the same line")

PARAMS = Params(
    "LinkLimitsParams",
    [
        ("windows", f"ptr:u8[{MAX_RANKS}]"),  # window of each rank, as this process addresses it
        ("local", "ptr:u8"),  # [num_rows, row_bytes]: what is stored or copied, where loads go
        ("target", "ptr:u8"),  # copy: [num_rows, row_bytes]: where to
        ("failed", "ptr:u32"),  # 0, or 1 + a rank that was late
        ("timeout_ns", "u64"),
        ("rows_offset", "u64"),  # offset of the rows in each window
        ("num_rows", "u32"),
        ("row_bytes", "u32"),  # a multiple of 16
        ("rows_per_rank", "u32"),  # rows of each source in a window: ceil(num_rows / max(R - 1, 1))
        ("rank", "u32"),
        ("num_ranks", "u32"),
        ("epoch", "u32"),  # flag, barrier: number of the first iteration
        ("iterations", "u32"),  # flag, barrier: how many
    ],
)

STAGES = 3
MAX_THREADS = 512


def _spec(name: str, static_smem: int) -> KernelSpec:
    folder = Path(__file__).resolve().parent
    return KernelSpec(
        name=name,
        source=folder / "kernel.cuh",
        include=folder.parent,
        params=PARAMS,
        max_registers=32,
        max_threads=MAX_THREADS,
        static_smem=static_smem,
        configs=({"stages": STAGES},),
        generated={header.name: header.text for header in (control_block.HEADER, HEADER)},
        other_registers=48,
    )


_BARRIERS = MAX_THREADS // 32 * STAGES * 8

STORE = _spec("link_limits_store", _BARRIERS)
LOAD = _spec("link_limits_load", _BARRIERS)
COPY = _spec("link_limits_copy", _BARRIERS)
FLAG = _spec("link_limits_flag", 0)
BARRIER = _spec("link_limits_barrier", 0)

SPECS = (STORE, LOAD, COPY, FLAG, BARRIER)
