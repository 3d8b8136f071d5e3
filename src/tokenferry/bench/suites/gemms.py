"""The GEMMs of a layer's experts, by each of torch's ways to batch them, and SMs that they leave to others."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WIDTH = 2048
"""Columns of an expert's hidden layer: DeepSeek-V3's."""

WEIGHT_BYTES = 8 << 30
"""Most memory for weights; experts beyond that share some."""

KINDS = ("bmm", "bmm, cuBLASLt", "grouped_mm")
"""
``bmm``: a strided batch through cuBLAS, torch's default; torch 2.11 does not pass the carve-out on to it.
``bmm, cuBLASLt``: the same through cuBLASLt, which takes the carve-out as a hint: some of its kernels obey.
``grouped_mm``: one product of all rows, cut up by offsets; its kernels have as many blocks as SMs are left to them.
"""

_CARVE_OUT = "_set_sm_carveout_experimental"


def missing(kind: str, left_out: int) -> str | None:
    """Return what this torch lacks to run one of `KINDS` with ``left_out`` SMs left out; None: nothing."""
    if left_out and not hasattr(torch._C, _CARVE_OUT):
        return f"this torch has no torch._C.{_CARVE_OUT}: its GEMMs leave no SMs out"
    if kind == "grouped_mm" and _grouped_mm() is None:
        return "this torch has no grouped_mm"
    return None


class Experts:
    """The two bfloat16 GEMMs of every local expert, over the rows that it received.

    Args:
        num_local: Experts of this rank.
        hidden: H.
        rows: Rows of each expert.
        device: Device of the matrices.
    """

    def __init__(self, num_local: int, hidden: int, rows: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(1)
        own = max(1, min(num_local, WEIGHT_BYTES // (3 * WIDTH * hidden * 2)))
        self._first, self._second, self._x = (
            torch.randn(*size, generator=generator, device=device, dtype=torch.float32).bfloat16()
            for size in ((own, hidden, 2 * WIDTH), (own, WIDTH, hidden), (own, rows, hidden))
        )
        self._ends = torch.arange(1, own + 1, dtype=torch.int32, device=device) * rows
        self._repeats = -(-num_local // own)
        self.flops = 2.0 * self._repeats * own * rows * hidden * 3 * WIDTH

    def work(self, kind: str) -> Callable[[], Tensor]:
        """Return what runs all of them on the current stream, by one of `KINDS` that is not `missing`."""
        grouped_mm = _grouped_mm() if kind == "grouped_mm" else None
        if grouped_mm is not None:
            x = self._x.flatten(0, 1)
            return lambda: self._run(x, lambda rows, weights: grouped_mm(rows, weights, offs=self._ends))
        return lambda: self._run(self._x, torch.bmm)

    def _run(self, x: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        y = x
        for _ in range(self._repeats):
            gate, up = multiply(x, self._first).chunk(2, -1)
            y = multiply(torch.nn.functional.silu(gate) * up, self._second)
        return y


def _grouped_mm() -> Callable[..., Tensor] | None:
    return getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


@contextmanager
def library(kind: str) -> Iterator[None]:
    """Let torch's products go through the library that ``kind`` names; what was set before comes back.

    A setting of the whole process, which torch reads whenever a product is launched.
    """
    if kind != "bmm, cuBLASLt" or not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


@contextmanager
def carve_out(num_sms: int) -> Iterator[None]:
    """Ask torch to launch GEMMs on all SMs but ``num_sms``; what was set before comes back. 0: nothing is asked.

    A setting of the whole process, which torch reads whenever a product is launched. Contract: nothing is `missing`.
    """
    if num_sms == 0:
        yield
        return
    ask: Any = getattr(torch._C, _CARVE_OUT)
    before = torch._C._get_sm_carveout_experimental()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        ask(num_sms)
    try:
        yield
    finally:
        ask(before)


def kernels_of(work: Callable[[], object]) -> list[dict[str, object]]:
    """Run some work under a profiler; return its kernels in order: ``name``, ``grid``, ``us``.

    Raises:
        RuntimeError: the profiler does not work on this GPU.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory(prefix="tokenferry-kernels-") as folder:
        file = Path(folder, "trace.json")
        seen.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    kernels = sorted((event for event in events if event.get("cat") == "kernel"), key=lambda event: event["ts"])
    return [{"name": one["name"], "grid": one["args"].get("grid"), "us": one["dur"]} for one in kernels]
