"""The common part of the specs of all kernels that a group launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenferry.jit.kernel import KernelSpec
from tokenferry.jit.params import Params
from tokenferry.kernels import codes, control_block, decode_words

__all__ = ["GENERATED", "describe"]

GENERATED = {header.name: header.text for header in (control_block.HEADER, codes.HEADER, decode_words.HEADER)}
"""The headers that any kernel may include beside the files of this folder."""


def describe(
    spec_file: str,
    fields: Sequence[tuple[str, str]],
    *,
    max_registers: int,
    max_threads: int,
    static_smem: int,
    configs: tuple[Mapping[str, int], ...] = ({},),
) -> KernelSpec:
    """Return the spec of the kernel in the folder of ``spec_file``, which has the name of the folder.

    Args:
        spec_file: ``__file__`` of its spec.py.
        fields: The fields of its params struct, ``<Name>Params``, after the common ones.
        max_registers: Most registers of a thread, as in `KernelSpec`.
        max_threads: Most threads of a block.
        static_smem: Most bytes of static shared memory of a block.
        configs: All sets of constants that the kernel is compiled with.
    """
    folder = Path(spec_file).parent
    camel = "".join(part.capitalize() for part in folder.name.split("_"))
    return KernelSpec(
        name=folder.name,
        source=folder / "kernel.cuh",
        include=folder.parent,
        params=Params(f"{camel}Params", (*control_block.COMMON, *fields)),
        max_registers=max_registers,
        max_threads=max_threads,
        static_smem=static_smem,
        configs=configs,
        generated=GENERATED,
    )
