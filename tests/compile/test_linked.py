"""The kernels that call NVSHMEM are linked with its device library, where this and nvJitLink are installed."""

import pytest

from support.kernel_promises import ARCH
from tokenferry.backends.cuda.across import nvshmem
from tokenferry.backends.cuda.across.nvshmem import NvshmemDevice
from tokenferry.errors import BackendUnavailable
from tokenferry.jit import compiler, linker
from tokenferry.jit.kernel import KernelSpec
from tokenferry.kernels.rail_receive.spec import SPEC as RECEIVE
from tokenferry.kernels.rail_send.spec import SPEC as SEND

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: kernels cannot be compiled here")


@pytest.fixture
def device() -> NvshmemDevice:
    reason = nvshmem.why_not()
    if reason:
        pytest.skip(f"kernels cannot be linked with NVSHMEM here: {reason}")
    return NvshmemDevice.find()


def linked(spec: KernelSpec, device: NvshmemDevice) -> bytes:
    built = compiler.compile_unit(spec.unit(spec.configs[0], ARCH))
    return linker.link(spec.name, built.image, ARCH, device.file)


@pytest.mark.parametrize("spec", [SEND, RECEIVE], ids=lambda spec: spec.name)
def test_kernels_are_linked_with_nvshmem(spec, device):
    """Nothing is left undefined, and what NVSHMEM writes its state into is there."""
    cubin = linked(spec, device)
    assert cubin.startswith(b"\x7fELF")
    assert spec.symbol.encode() in cubin
    assert b"nvshmemi_device_lib_version_d" in cubin


def test_a_function_that_nvshmem_does_not_have(device):
    """Such as one of another version."""
    unit = SEND.unit(SEND.configs[0], ARCH)
    header = unit.headers["device/nvshmem.cuh"].replace(
        "nvshmemi_transfer_put_signal", "nvshmemi_transfer_put_signal_2"
    )
    built = compiler.compile_unit(
        compiler.Unit(unit.name, unit.text, {**unit.headers, "device/nvshmem.cuh": header}, unit.options)
    )
    with pytest.raises(BackendUnavailable, match=r"nvJitLink cannot link it with .*\n.*nvshmemi_transfer_put_signal_2"):
        linker.link(unit.name, built.image, ARCH, device.file)
