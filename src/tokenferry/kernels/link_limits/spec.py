"""The host's half of kernel.cuh: params, sizes, promises. `tokenferry.bench.suites.links` launches them."""

from __future__ import annotations

from pathlib import Path

from tokenferry.jit.kernel import KernelSpec
from tokenferry.jit.params import Params

PARAMS = Params(
    "LinkLimitsParams",
    [
        ("windows", "ptr[8]"),  # window of each rank, as this process addresses it
        ("local", "ptr"),  # [num_rows, row_bytes]: what is stored or copied, where loads go
        ("target", "ptr"),  # copy: [num_rows, row_bytes]: where to
        ("failed", "ptr:u32"),  # 0, or 1 + the rank that did not come in time
        ("timeout_ns", "u64"),
        ("rows_offset", "u64"),  # of the rows in each window
        ("num_rows", "u32"),
        ("row_bytes", "u32"),  # a multiple of 16
        ("rows_per_rank", "u32"),  # places for the rows of each source: ceil(num_rows / max(R - 1, 1))
        ("rank", "u32"),
        ("num_ranks", "u32"),
        ("epoch", "u32"),  # flag, barrier: number of the first round
        ("rounds", "u32"),  # flag, barrier: how many
    ],
)

MAX_RANKS = 8
STAGES = 3
MAX_THREADS = 512
WORD_STRIDE = 128


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
    )


_BARRIERS = MAX_THREADS // 32 * STAGES * 8

STORE = _spec("link_limits_store", _BARRIERS)
LOAD = _spec("link_limits_load", _BARRIERS)
COPY = _spec("link_limits_copy", _BARRIERS)
FLAG = _spec("link_limits_flag", 0)
BARRIER = _spec("link_limits_barrier", 0)

SPECS = (STORE, LOAD, COPY, FLAG, BARRIER)
