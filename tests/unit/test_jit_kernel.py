"""Kernels and the Jit that keeps them, with a driver and a compiler made of Python."""
# ruff: noqa: N802 - the driver's own names

import ctypes
import dataclasses
import enum
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest

from tokenferry.errors import BackendUnavailable, ClosedError, ConfigError
from tokenferry.jit import compiler, driver, kernel
from tokenferry.jit.compiler import Built
from tokenferry.jit.kernel import Jit, KernelSpec
from tokenferry.jit.params import Params

OK, INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT, INVALID_HANDLE = 0, 1, 2, 201, 400
PARAMS = Params("ToyParams", [("n", "i32"), ("x", "ptr")])


class Result(enum.IntEnum):
    CUDA_SUCCESS = OK
    CUDA_ERROR_INVALID_VALUE = INVALID_VALUE
    CUDA_ERROR_OUT_OF_MEMORY = OUT_OF_MEMORY
    CUDA_ERROR_INVALID_CONTEXT = INVALID_CONTEXT
    CUDA_ERROR_INVALID_HANDLE = INVALID_HANDLE


class FakeDriver:
    """Records what reaches the driver; kernels need context 77 of device 3."""

    CUresult = Result
    CUlaunchConfig = SimpleNamespace
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=0, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=1
    )
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    CUstream = int

    def __init__(self, capability=(9, 0)):
        self.capability = capability
        self.contexts = [77]
        self.modules = {}
        self.launches = []
        self.smem = []
        self.released = 0

    def cuInit(self, flags):
        return (Result.CUDA_SUCCESS,)

    def cuDeviceGet(self, index):
        return (Result.CUDA_SUCCESS, index * 10) if index == 3 else (Result.CUDA_ERROR_INVALID_VALUE, None)

    def cuDevicePrimaryCtxRetain(self, device):
        return Result.CUDA_SUCCESS, 77

    def cuDevicePrimaryCtxRelease(self, device):
        self.released += 1
        return (Result.CUDA_SUCCESS,)

    def cuDeviceGetAttribute(self, kind, device):
        return Result.CUDA_SUCCESS, self.capability[kind]

    def cuCtxPushCurrent(self, context):
        self.contexts.append(context)
        return (Result.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self):
        return Result.CUDA_SUCCESS, self.contexts.pop()

    def cuModuleLoadData(self, image):
        assert self.contexts[-1] == 77
        self.modules[len(self.modules) + 1] = image
        return Result.CUDA_SUCCESS, len(self.modules)

    def cuModuleGetFunction(self, module, name):
        return Result.CUDA_SUCCESS, (module, name)

    def cuFuncLoad(self, function):
        return (Result.CUDA_SUCCESS,)

    def cuModuleUnload(self, module):
        assert self.contexts[-1] == 77
        del self.modules[module]
        return (Result.CUDA_SUCCESS,)

    def cuFuncSetAttribute(self, function, kind, value):
        self.smem.append(value)
        return (Result.CUDA_ERROR_INVALID_VALUE if value > 227 * 1024 else Result.CUDA_SUCCESS,)

    def cuLaunchKernelEx(self, packed, function, arguments, extra):
        if self.contexts[-1] != 77:
            return (
                Result.CUDA_ERROR_INVALID_CONTEXT if self.contexts[-1] is None else Result.CUDA_ERROR_INVALID_HANDLE,
            )
        if packed.gridDimX == 0:
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        struct = PARAMS.struct.from_address(ctypes.c_uint64.from_address(arguments).value)
        sizes = (packed.gridDimX, packed.blockDimX, packed.sharedMemBytes, packed.hStream)
        self.launches.append((function[1], sizes, struct.n, struct.x))
        return (Result.CUDA_SUCCESS,)


class FakeCompiler:
    def __init__(self):
        self.units = []

    def __call__(self, unit):
        self.units.append(unit)
        return Built(b"\x7fELF" + unit.text.encode(), "")


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeDriver()
    monkeypatch.setattr(driver, "bindings", lambda name="driver": fake)
    monkeypatch.setattr(compiler, "version", lambda: "13.0.88")
    return fake


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "kernel.cuh").write_text("// nothing")
    configs = ({"num_stages": 4, "wide": 0}, {"num_stages": 8, "wide": 1})
    return KernelSpec("toy", tmp_path / "kernel.cuh", tmp_path, PARAMS, 32, 128, 0, configs)


def toy(spec, compile_unit=None):
    return Jit(3, None, compile_unit or FakeCompiler()).kernel(spec, num_stages=4, wide=0)


def test_a_device_releases_its_context_once(cuda, spec, monkeypatch):
    device = driver.Device(3)
    device.close()
    device.close()
    del device
    assert cuda.released == 1
    device = driver.Device(3)
    del device
    assert cuda.released == 2, "nobody closed it, and nothing needs it"
    with monkeypatch.context() as child:
        device = driver.Device(3)
        child.setattr(driver.os, "getpid", lambda: 1)
        del device
    assert cuda.released == 2, "a forked child has no context"
    kernel = toy(spec)
    assert cuda.released == 2, "the kernel needs it, whatever became of what loaded it"
    del kernel
    assert cuda.released == 3


def test_a_launch_reaches_the_driver(cuda, spec):
    kernel = toy(spec)
    params = kernel.new_params()
    params.n, params.x = -5, 2**40
    kernel.launch(params, 16, 128, 1000, 0)
    params.n = 6
    kernel.launch(params, 16, 128, 1000, 0x3000)
    assert cuda.launches == [
        (b"toy", (16, 128, 1000, 0), -5, 2**40),
        (b"toy", (16, 128, 1000, 0x3000), 6, 2**40),
    ]


def test_sizes_are_packed_once(cuda, spec, monkeypatch):
    made = []
    monkeypatch.setattr(cuda, "CUlaunchConfig", lambda: made.append(1) or SimpleNamespace(), raising=False)
    kernel = toy(spec)
    params = kernel.new_params()
    for _ in range(5):
        for sizes in ((1, 32, 0, 7), (2, 32, 0, 7), (1, 64, 0, 7), (1, 32, 8, 7), (1, 32, 0, 8)):
            kernel.launch(params, *sizes)
    assert [sizes for _, sizes, _, _ in cuda.launches[-5:]] == [
        (1, 32, 0, 7), (2, 32, 0, 7), (1, 64, 0, 7), (1, 32, 8, 7), (1, 32, 0, 8)
    ]  # fmt: skip
    assert len(made) == 5


def test_shared_memory_is_asked_for_when_it_grows(cuda, spec):
    kernel = toy(spec)
    for smem_bytes in (0, 1000, 1000, 500, 200_000, 1000):
        kernel.launch(kernel.new_params(), 1, 32, smem_bytes, 0)
    assert cuda.smem == [1000, 200_000]


def test_too_much_shared_memory_names_kernel_and_size(cuda, spec):
    kernel = toy(spec)
    with pytest.raises(
        BackendUnavailable, match="kernel toy: asking for 300000 bytes of dynamic shared memory a block"
    ):
        kernel.launch(kernel.new_params(), 1, 32, 300_000, 0)
    kernel.launch(kernel.new_params(), 1, 32, 100_000, 0)
    assert cuda.smem == [300_000, 100_000], "the size that was refused counts as given"


def test_a_launch_that_is_refused_names_kernel_code_and_sizes(cuda, spec):
    kernel = toy(spec)
    message = (
        r"launch of kernel toy \(0 blocks of 32 threads, 9 bytes of shared memory\) failed: CUDA_ERROR_INVALID_VALUE"
    )
    with pytest.raises(BackendUnavailable, match=message):
        kernel.launch(kernel.new_params(), 0, 32, 9, 0)


@pytest.mark.parametrize("context", [None, 55], ids=["no context", "that of another device"])
def test_a_thread_with_another_context_can_launch_and_keeps_it(cuda, spec, context):
    kernel = toy(spec)
    cuda.contexts.append(context)
    kernel.launch(kernel.new_params(), 1, 32, 64, 0)
    assert len(cuda.launches) == 1
    assert cuda.contexts == [77, context]


def test_streams_without_end_do_not_fill_the_memory(cuda, spec):
    kernel = toy(spec)
    for stream in range(3000):
        kernel.launch(kernel.new_params(), 1, 32, 0, stream)
    assert len(cuda.launches) == 3000
    assert len(kernel._packed) <= 1024


def test_a_kernel_is_compiled_once_for_each_config(cuda, spec):
    compile_unit = FakeCompiler()
    jit = Jit(3, None, compile_unit)
    first = jit.kernel(spec, num_stages=4, wide=0)
    assert jit.kernel(spec, wide=0, num_stages=4) is first
    other = jit.kernel(spec, wide=1, num_stages=8)
    assert other is not first
    assert ["constexpr int kNumStages = 8;" in unit.text for unit in compile_unit.units] == [False, True]
    assert jit.kernel(dataclasses.replace(spec), num_stages=4, wide=0) is not first


def test_warmup_compiles_everything_and_the_cache_serves_the_next(cuda, spec, tmp_path):
    compile_unit = FakeCompiler()
    jit = Jit(3, tmp_path / "cache", compile_unit)
    jit.warmup([spec])
    assert len(compile_unit.units) == 2
    jit.kernel(spec, num_stages=8, wide=1)
    assert len(compile_unit.units) == 2

    def no_compiler(unit):
        raise AssertionError(f"{unit.name} is in the cache")

    Jit(3, tmp_path / "cache", no_compiler).warmup([spec])


class FakeLibrary:
    """A device library that notes what it does with modules."""

    file = Path("library.a")

    def __init__(self, cuda, version="one"):
        self.cuda, self.version, self.done = cuda, version, []

    def enter(self, module):
        assert self.cuda.contexts[-1] == 77
        self.done.append(("enter", module))

    def leave(self, module):
        assert module in self.cuda.modules, "not unloaded yet"
        self.done.append(("leave", module))


def test_relocatable_kernels_are_linked_before_they_are_loaded(cuda, spec, tmp_path, monkeypatch):
    """And kept for this version of the library alone; other kernels have nothing to do with it."""
    linked = []

    def link(name, cubin, arch, file):
        linked.append((name, arch, file))
        return b"\x7fELF linked"

    monkeypatch.setattr(kernel, "link", link)
    library, compile_unit = FakeLibrary(cuda), FakeCompiler()
    jit = Jit(3, tmp_path / "cache", compile_unit, library)
    jit.kernel(dataclasses.replace(spec, relocatable=True), num_stages=4, wide=0)
    jit.kernel(spec, num_stages=4, wide=0)
    assert linked == [("toy", "sm_90a", library.file)]
    assert [image == b"\x7fELF linked" for image in cuda.modules.values()] == [True, False]
    assert ["-rdc=true" in unit.options for unit in compile_unit.units] == [True, False]
    jit.close()
    assert library.done == [("enter", 1), ("leave", 1)]
    for version, times in (("one", 1), ("two", 2)):
        again = Jit(3, tmp_path / "cache", compile_unit, FakeLibrary(cuda, version))
        again.kernel(dataclasses.replace(spec, relocatable=True), num_stages=4, wide=0)
        assert len(linked) == times


def test_warmup_passes_on_what_went_wrong(cuda, spec):
    def refuse(unit):
        raise BackendUnavailable("kernel toy: no")

    with pytest.raises(BackendUnavailable, match="kernel toy: no"):
        Jit(3, None, refuse).warmup([spec])


def test_threads_that_ask_at_once_get_one_kernel(cuda, spec):
    compiler, all_ask, found = FakeCompiler(), threading.Barrier(4), []

    def compile_unit(unit):
        time.sleep(0.1)  # so that the others ask meanwhile
        return compiler(unit)

    jit = Jit(3, None, compile_unit)

    def ask():
        all_ask.wait(10)
        found.append(jit.kernel(spec, num_stages=4, wide=0))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 4
    assert len(set(map(id, found))) == 1
    assert len(cuda.modules) == 1
    assert len(compiler.units) == 1


def test_what_goes_wrong_ahead_is_not_taken_for_the_end(cuda, spec):
    def refuse(unit):
        raise IndexError("of the compiler")

    jit, ahead, keys = Jit(3, None, refuse), SimpleNamespace(shutdown=lambda wait: None), deque()
    jit._build_next(ahead, keys)
    keys.append((spec, (("num_stages", 4), ("wide", 0))))
    with pytest.raises(IndexError, match="of the compiler"):
        jit._build_next(ahead, keys)


def test_a_kernel_that_did_not_compile_is_tried_again(cuda, spec):
    results = [OSError("no memory"), Built(b"\x7fELF", "")]

    def compile_unit(unit):
        result = results.pop(0)
        if isinstance(result, OSError):
            raise result
        return result

    jit = Jit(3, None, compile_unit)
    with pytest.raises(OSError, match="no memory"):
        jit.kernel(spec, num_stages=4, wide=0)
    assert jit.kernel(spec, num_stages=4, wide=0)


class Gate:
    """A compiler that waits, for all units but the first of each config, until it is opened."""

    def __init__(self):
        self.opened, self.begun, self.units = threading.Event(), threading.Semaphore(0), []

    def __call__(self, unit):
        self.units.append(unit)
        self.begun.release()
        assert self.opened.wait(10)
        return Built(b"\x7fELF", "")


def test_kernels_are_compiled_in_the_background(cuda, spec):
    gate = Gate()
    jit = Jit(3, None, gate)
    jit.compile_ahead([spec])
    for _ in spec.configs:
        assert gate.begun.acquire(timeout=10)  # compile_ahead has returned, and both are under way
    assert not cuda.modules, "nothing is loaded before it is needed"
    gate.opened.set()
    jit.warmup([spec])
    assert len(gate.units) == len(spec.configs) == len(cuda.modules)
    jit.compile_ahead([spec])
    assert len(gate.units) == len(spec.configs)


def test_what_goes_wrong_in_the_background_is_raised_where_the_kernel_is_needed(cuda, spec):
    def refuse(unit):
        raise BackendUnavailable("kernel toy: no")

    jit = Jit(3, None, refuse)
    jit.compile_ahead([spec])
    with pytest.raises(BackendUnavailable, match="kernel toy: no"):
        jit.kernel(spec, num_stages=4, wide=0)


def test_a_closed_jit_compiles_nothing_more(cuda, spec):
    gate = Gate()
    specs = [spec, *(dataclasses.replace(spec) for _ in range(10))]
    jit = Jit(3, None, gate)
    jit.compile_ahead(specs)
    assert gate.begun.acquire(timeout=10)
    jit.close()
    gate.opened.set()
    jit._ahead.shutdown(wait=True)
    assert len(gate.units) <= 2, "those that were under way"
    jit.compile_ahead(specs)


def test_devices_begin_at_different_kernels(cuda, spec):
    first = []

    def compile_unit(unit):
        first.append(unit.name)
        return Built(b"\x7fELF", "")

    names = [f"kernel{i}" for i in range(8)]
    jit = Jit(3, None, compile_unit)
    jit.compile_ahead([dataclasses.replace(spec, name=name, configs=spec.configs[:1]) for name in names])
    deadline = time.monotonic() + 10
    while len(first) < len(names) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(first) == names
    assert set(first[:2]) <= {"kernel3", "kernel4", "kernel5"}


ENDS = """
import atexit, threading, time
from concurrent.futures import thread as pools
from types import SimpleNamespace
from tokenferry.jit import kernel

class Spec:
    configs = [{"n": n} for n in range(1000)]

jit = kernel.Jit.__new__(kernel.Jit)
jit._device, jit._lock, jit._closed = SimpleNamespace(index=0), threading.Lock(), False
jit._kernels, jit._builds, jit._ahead = {}, {}, None
begun = threading.Event()

def build(spec, config):
    begun.set()
    while not pools._shutdown:  # under way until the program ends
        time.sleep(0.001)
    return b""

jit._build = build
jit.compile_ahead([Spec()])
begun.wait(30)
num_builds = len(jit._builds)
atexit.register(lambda: print(num_builds, len(jit._builds)))
"""


def test_a_program_that_ends_waits_only_for_what_is_under_way():
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=240, check=True)
    assert done.stderr == ""
    before, after = map(int, done.stdout.split())
    assert 0 < before <= after <= before + 4


def test_a_spec_can_be_loaded_alone(cuda, spec):
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed: nothing can be compiled here")
    kernel = spec.load(3, {"num_stages": 4, "wide": 0})
    kernel.launch(kernel.new_params(), 1, 32, 0, 0)
    assert [image[:4] for image in cuda.modules.values()] == [b"\x7fELF"]


def test_unknown_configs_are_refused(cuda, spec):
    with pytest.raises(ConfigError, match="num_stages': 5"):
        Jit(3, None, FakeCompiler()).kernel(spec, num_stages=5, wide=0)


def test_close_unloads_once(cuda, spec):
    jit = Jit(3, None, FakeCompiler())
    jit.warmup([spec])
    assert len(cuda.modules) == 2
    jit.close()
    jit.close()
    assert (cuda.modules, cuda.released, cuda.contexts) == ({}, 1, [77])
    with pytest.raises(ClosedError, match="kernel toy: the Jit was closed"):
        jit.kernel(spec, num_stages=4, wide=0)


@pytest.mark.parametrize(
    ("capability", "arch"), [((9, 0), "sm_90a"), ((8, 0), "sm_80"), ((8, 9), "sm_89"), ((10, 3), "sm_103a")]
)
def test_the_architecture_is_the_device_s(monkeypatch, cuda, spec, capability, arch):
    cuda.capability, compile_unit = capability, FakeCompiler()
    toy(spec, compile_unit)
    assert compile_unit.units[0].options[0] == f"-arch={arch}"


def test_a_device_that_is_not_there(cuda):
    with pytest.raises(BackendUnavailable, match=r"opening CUDA device 5 failed: CUDA_ERROR_INVALID_VALUE \(1\)"):
        Jit(5, None)


def test_no_driver(cuda):
    def fail(flags):
        raise RuntimeError("libcuda.so.1 not found")

    cuda.cuInit = fail
    with pytest.raises(BackendUnavailable, match=r"no driver on this machine \(libcuda.so.1 not found\); install"):
        Jit(3, None)


def test_a_driver_that_sees_no_gpu(cuda):
    class NoDevice(enum.IntEnum):
        CUDA_ERROR_NO_DEVICE = 100

    cuda.cuInit = lambda flags: (NoDevice.CUDA_ERROR_NO_DEVICE,)
    with pytest.raises(BackendUnavailable, match=r"^CUDA: cuInit failed: CUDA_ERROR_NO_DEVICE \(100\)$"):
        Jit(3, None)


def test_cuda_bindings_missing():
    with pytest.raises(BackendUnavailable, match="pip install 'cuda-bindings==13"):
        driver.bindings("no_such_module")


def test_check():
    assert driver.check((Result.CUDA_SUCCESS,), "x") is None
    assert driver.check((Result.CUDA_SUCCESS, 0), "x") == 0
    assert driver.check((Result.CUDA_SUCCESS, 4, 5), "x") == (4, 5)
    with pytest.raises(BackendUnavailable, match=r"^CUDA: growing failed: CUDA_ERROR_OUT_OF_MEMORY \(2\)$"):
        driver.check((Result.CUDA_ERROR_OUT_OF_MEMORY, 4), "growing")


@pytest.mark.parametrize(("arch", "attributes"), [(None, 1), ("compute_80", 0)])
def test_kernels_start_early_only_where_they_can_wait(cuda, spec, monkeypatch, arch, attributes):
    """Code for older GPUs does not wait for the kernel before it, so it must not start earlier either."""
    made = []
    monkeypatch.setattr(cuda, "CUlaunchConfig", lambda: made.append(SimpleNamespace()) or made[-1], raising=False)
    monkeypatch.setattr(cuda, "CUlaunchAttribute", lambda: SimpleNamespace(value=SimpleNamespace()), raising=False)
    ids = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6)
    monkeypatch.setattr(cuda, "CUlaunchAttributeID", ids, raising=False)
    compiled = FakeCompiler()
    early = dataclasses.replace(spec, early=True)
    kernel = Jit(3, None, compiled, arch=arch).kernel(early, num_stages=4, wide=0)
    kernel.launch(kernel.new_params(), 1, 32, 0, 0)
    assert [packed.numAttrs for packed in made] == [attributes]
    assert compiled.units[0].options[0] == f"-arch={arch or 'sm_90a'}"
    assert f"constexpr int kDependentLaunch = {attributes};" in compiled.units[0].text


def test_code_that_the_gpu_cannot_run_is_an_error(cuda):
    with pytest.raises(ConfigError, match="TOKENFERRY_ARCH=compute_120: a GPU of sm_90a cannot run such code"):
        Jit(3, None, arch="compute_120")
