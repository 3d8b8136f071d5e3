"""What the specs of all kernels that meet have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tokenferry.jit.kernel import KernelSpec
from tokenferry.jit.params import Params
from tokenferry.kernels.control_block import COMMON

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
"""What device/number.cuh calls the types of numbers: its ``kType``."""


def describe(
    spec_file: str,
    fields: Sequence[tuple[str, str]],
    *,
    max_registers: int,
    max_threads: int,
    static_smem: int,
    configs: tuple[Mapping[str, int], ...] = ({},),
) -> KernelSpec:
    """The spec of the kernel in the folder of ``spec_file``, which has the folder's name.

    Args:
        spec_file: ``__file__`` of its spec.py.
        fields: Of its params struct, ``<Name>Params``, behind the common ones.
        max_registers: See `KernelSpec`, as the others.
        max_threads: Of a block.
        static_smem: Bytes of a block.
        configs: All that are compiled.
    """
    folder = Path(spec_file).parent
    camel = "".join(part.capitalize() for part in folder.name.split("_"))
    return KernelSpec(
        name=folder.name,
        source=folder / "kernel.cuh",
        include=folder.parent,
        params=Params(f"{camel}Params", (*COMMON, *fields)),
        max_registers=max_registers,
        max_threads=max_threads,
        static_smem=static_smem,
        configs=configs,
    )
