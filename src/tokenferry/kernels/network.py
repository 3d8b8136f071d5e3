"""The network library that rail_send and rail_receive are linked with; device/rails.cuh says what it defines."""

from __future__ import annotations

from dataclasses import replace

from tokenferry.jit.kernel import KernelSpec

NVSHMEM = '#include "device/nvshmem.cuh"\n'
"""The header of NVSHMEM, whose functions are in a library of devices."""


def linked(spec: KernelSpec, header: str, *, relocatable: bool = True) -> KernelSpec:
    """Return the spec of a kernel with a network library.

    Args:
        spec: The kernel, which includes ``generated/network.cuh``.
        header: What that is.
        relocatable: Whether the kernel has to be linked; else the header has the whole library.
    """
    generated = {**spec.generated, "generated/network.cuh": header}
    return replace(spec, generated=generated, relocatable=relocatable)
