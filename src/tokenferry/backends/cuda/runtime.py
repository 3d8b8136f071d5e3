"""The device of a rank as the backend uses it: a seam, so that tests can run the backend without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tokenferry.jit.driver import Device
from tokenferry.jit.kernel import Jit, KernelSpec
from tokenferry.jit.linker import DeviceLibrary
from tokenferry.memory.streams import CudaStreams, Streams


@dataclass(frozen=True, slots=True)
class Runtime:
    """The kernels, driver and streams with which one rank works.

    Attributes:
        jit: The compiled kernels.
        driver: The device and its context.
        streams: The streams that order the work.
        num_sms: Multiprocessors of the device.
        smem_bytes: Shared memory that a block may have.
    """

    jit: Jit
    driver: Device
    streams: Streams
    num_sms: int
    smem_bytes: int


@dataclass(frozen=True, slots=True)
class Target:
    """What kernels are compiled for.

    Attributes:
        arch: An architecture; None: that of the GPU.
        peer_atomics: Whether the GPU's atomics on the memory of its peers are atomic.
    """

    arch: str | None
    peer_atomics: bool


def cuda_runtime(
    device: torch.device,
    cache: Path,
    specs: Sequence[KernelSpec],
    target: Target,
    library: DeviceLibrary | None = None,
) -> Runtime:
    """Return the runtime of a GPU, and begin to compile its kernels, so that first calls wait for few of them.

    Args:
        device: The GPU.
        cache: Folder of compiled kernels.
        specs: The kernels that calls may need, the first ones first.
        target: What they are compiled for.
        library: What relocatable ones are linked with.

    Raises:
        BackendUnavailable: cuda-bindings, the driver or the device is missing.
        ConfigError: the GPU cannot run code for this architecture.
    """
    index = device.index or 0
    driver = Device(index)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    jit = Jit(index, cache, library=library, arch=target.arch, peer_atomics=target.peer_atomics)
    jit.compile_ahead(specs)
    return Runtime(jit, driver, CudaStreams(driver), num_sms, driver.smem_bytes())
