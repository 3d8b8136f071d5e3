"""Kernels: the description of one (``KernelSpec``), a compiled one (``Kernel``), all those of a device (``Jit``)."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenferry.errors import ClosedError, ConfigError
from tokenferry.jit import compiler
from tokenferry.jit.cache import Cache
from tokenferry.jit.driver import Device, check
from tokenferry.jit.linker import DeviceLibrary, link
from tokenferry.jit.params import Params, Struct
from tokenferry.jit.source import Unit, check_arch, headers, options, target, translation_unit

_MAX_PACKED = 1024
_COMPILE_THREADS = 8
_AHEAD_THREADS = 2
_DEVICES = 8
"""Of a host; with more, some begin to compile at the same kernel."""

Compile = Callable[[Unit], compiler.Built]
_Config = tuple[tuple[str, int], ...]
"""The constants of a config, in the order of their names."""


@dataclass(frozen=True, eq=False)
class KernelSpec:
    """The description of a kernel: its files, its params, and limits of its resources.

    Attributes:
        name: The kernel's name in messages, and its ``extern "C"`` entry point if ``entry`` is empty.
        source: The ``.cuh`` file.
        include: Root folder of ``#include "device/x.cuh"`` lines.
        params: The struct that the kernel takes by value: ``const __grid_constant__ <params.name> p``.
        max_registers: Limit of registers per thread on sm_90a, without spills; a test compiles every config and checks
            it.
        max_threads: Limit of threads per block: the constant ``kMaxThreads``, for ``__launch_bounds__``.
        static_smem: Limit of bytes of static shared memory per block.
        configs: Every set of compile-time constants that may be used: ``{"num_stages": 4}`` becomes
            ``constexpr int kNumStages = 4;``.
        generated: Text of headers that are not files below ``include``, by the name in their ``#include`` lines.
        early: Whether the kernel begins with ``wait_for_kernel_before``: GPUs with programmatic dependent launch may
            then start it before the previous kernel has ended, which hides a part of the launch latency.
        relocatable: Whether the kernel calls functions of a device library, and is linked before it is loaded.
        entry: The entry point if it lies in a namespace, such as ``"low_latency::dispatch"``: the name in profiles.
        other_registers: Limit of registers per thread on other architectures; 0: as on sm_90a.
    """

    name: str
    source: Path
    include: Path
    params: Params
    max_registers: int
    max_threads: int
    static_smem: int
    configs: tuple[Mapping[str, int], ...]
    generated: Mapping[str, str] = field(default_factory=dict)
    early: bool = False
    relocatable: bool = False
    entry: str = ""
    other_registers: int = 0

    @property
    def symbol(self) -> str:
        """The entry point's name in the binary: its own, or the mangled one of a function that takes the params."""
        if not self.entry:
            return self.name
        parts = "".join(f"{len(part)}{part}" for part in self.entry.split("::"))
        return f"_ZN{parts}E{len(self.params.name)}{self.params.name}"

    def unit(self, config: Mapping[str, int], arch: str, *, peer_atomics: bool = True) -> Unit:
        """Return the translation unit for one config and an architecture such as ``"sm_90a"``; reads the files.

        ``peer_atomics``: whether atomics on the memory of other GPUs are atomic.

        Raises:
            ConfigError: the config is not one of ``configs``, or a header is missing.
        """
        if dict(config) not in [dict(known) for known in self.configs]:
            raise ConfigError(
                f"kernel {self.name}: config {dict(config)} is not one that it is compiled and tested for; "
                f"add it to the spec's configs: {[dict(known) for known in self.configs]}"
            )
        constants = {**config, "max_threads": self.max_threads, **target(arch), "peer_atomics": peer_atomics}
        text, own = translation_unit(self.source, self.params.cpp, constants, self.include)
        included = headers(own, self.source, self.include, self.generated)
        return Unit(self.name, text, included, options(arch, relocatable=self.relocatable))

    def load(self, device_index: int, config: Mapping[str, int]) -> Kernel:
        """Compile and return one kernel without a cache, for experiments. Everything else should use a ``Jit``.

        Raises:
            BackendUnavailable: no GPU, no NVRTC, or the kernel does not compile.
            ConfigError: as ``unit``.
        """
        return Jit(device_index, None).kernel(self, **config)


class Kernel:
    """A compiled kernel, loaded on one device. Several threads may launch it, each with its own params.

    Args:
        spec: The description of the kernel.
        device: The device on which the kernel is loaded.
        function: The kernel's ``CUfunction`` handle.
        early: Whether it may start before the previous kernel has ended.
    """

    def __init__(self, spec: KernelSpec, device: Device, function: Any, *, early: bool) -> None:  # noqa: ANN401
        self.spec = spec
        self._early = early
        self._device = device
        self._function = function
        self._submit = device.cuda.cuLaunchKernelEx
        self._packed: dict[tuple[int, int, int, int], Any] = {}
        self._lock = threading.Lock()
        self._smem_bytes = 0

    def new_params(self) -> Struct:
        """Return zeroed params for this kernel. Reuse them: making them costs more than a launch."""
        return self.spec.params.struct()

    def launch(self, params: Struct, grid: int, block: int, smem_bytes: int, stream: int) -> None:
        """Enqueue the kernel without waiting for it. The params are copied, and may be overwritten on return.

        Args:
            params: From ``new_params`` of a kernel of the same spec; no other thread may write them during the call.
            grid: Number of blocks, at least 1.
            block: Threads per block, at most ``spec.max_threads``.
            smem_bytes: Dynamic shared memory per block.
            stream: Handle of the stream (``torch.cuda.current_stream().cuda_stream``) on this kernel's device.

        Raises:
            BackendUnavailable: the driver reported an error; names the kernel, the code and the sizes.
        """
        packed = self._packed.get((grid, block, smem_bytes, stream))
        if packed is None:
            packed = self._pack(grid, block, smem_bytes, stream)
        result = self._submit(packed, self._function, params.arguments_address, 0)
        if result[0] != 0:
            self._retry(result, packed, params)

    def _pack(self, grid: int, block: int, smem_bytes: int, stream: int) -> Any:  # noqa: ANN401 - a CUlaunchConfig
        """Return the launch config for the driver; it is never changed again, so that threads may share it."""
        cuda = self._device.cuda
        with self._lock:
            if smem_bytes > self._smem_bytes:
                with self._device.current():
                    kind = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    what = f"kernel {self.spec.name}: asking for {smem_bytes} bytes of dynamic shared memory a block"
                    check(cuda.cuFuncSetAttribute(self._function, kind, smem_bytes), what)
                self._smem_bytes = smem_bytes
            packed = cuda.CUlaunchConfig()
            packed.gridDimX, packed.gridDimY, packed.gridDimZ = grid, 1, 1
            packed.blockDimX, packed.blockDimY, packed.blockDimZ = block, 1, 1
            packed.sharedMemBytes = smem_bytes
            packed.hStream = cuda.CUstream(stream)
            packed.numAttrs = 0
            if self._early:
                early = cuda.CUlaunchAttribute()
                early.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
                early.value.programmaticStreamSerializationAllowed = 1
                packed.attrs = [early]
                packed.numAttrs = 1
            if len(self._packed) >= _MAX_PACKED:
                self._packed.clear()  # the application keeps making new streams
            self._packed[grid, block, smem_bytes, stream] = packed
        return packed

    def _retry(self, result: tuple[Any, ...], packed: Any, params: Struct) -> None:  # noqa: ANN401 - a CUlaunchConfig
        """Launch again in this device's context if the thread has none or another one; raise an error otherwise."""
        codes = self._device.cuda.CUresult
        if result[0] in (codes.CUDA_ERROR_INVALID_CONTEXT, codes.CUDA_ERROR_INVALID_HANDLE):
            with self._device.current():
                result = self._submit(packed, self._function, params.arguments_address, 0)
        sizes = (
            f"{packed.gridDimX} blocks of {packed.blockDimX} threads, {packed.sharedMemBytes} bytes of shared memory"
        )
        check(result, f"launch of kernel {self.spec.name} ({sizes})")


class Jit:
    """The compiled kernels of one device; each backend has its own. Thread-safe.

    Args:
        device_index: Index of the device in torch.
        folder: Folder of the cubin cache, shared by processes; None: no cache.
        compile_unit: The compiler; tests pass their own.
        library: What relocatable kernels are linked with; None: there are none.
        arch: What kernels are compiled for, such as ``"compute_80"``; None: for the device.
        peer_atomics: Whether the device's atomics on the memory of its peers are atomic.

    Raises:
        BackendUnavailable: cuda-bindings, the driver or the device is missing.
        ConfigError: the device cannot run code for ``arch``, or is too old.
    """

    def __init__(
        self,
        device_index: int,
        folder: Path | None,
        compile_unit: Compile = compiler.compile_unit,
        library: DeviceLibrary | None = None,
        *,
        arch: str | None = None,
        peer_atomics: bool = True,
    ) -> None:
        self._device = Device(device_index)
        self._arch = arch or self._device.arch()
        check_arch(self._arch, self._device.arch())
        self._peer_atomics = peer_atomics
        self._cache = Cache(folder)
        self._compile = compile_unit
        self._library = library
        self._lock = threading.Lock()
        self._kernels: dict[tuple[KernelSpec, _Config], Kernel] = {}
        self._builds: dict[tuple[KernelSpec, _Config], Future[bytes]] = {}
        self._ahead: ThreadPoolExecutor | None = None
        self._modules: list[Any] = []
        self._leave: list[Callable[[], None]] = []
        self._closed = False

    def kernel(self, spec: KernelSpec, **config: int) -> Kernel:
        """Return the kernel of a spec in one of its configs; compiled on first use, later calls cost a microsecond.

        Raises:
            BackendUnavailable: the kernel does not compile or load here.
            ClosedError: this Jit was closed.
            ConfigError: the config is not one of ``spec.configs``.
        """
        key = (spec, tuple(sorted(config.items())))
        kernel = self._kernels.get(key)
        if kernel is None:
            image = self._built(*key)
            with self._lock:
                kernel = self._kernels.get(key) or self._load(spec, image)
                self._kernels[key] = kernel
                self._builds.pop(key, None)
        return kernel

    def compile_ahead(self, specs: Iterable[KernelSpec]) -> None:
        """Begin to compile every config of all specs in the background; returns at once.

        A kernel that is needed before its turn is compiled at once. What goes wrong is raised where it is needed. The
        devices of a host begin at different kernels, so that their processes share the work through the cache.
        """
        keys = deque((spec, tuple(sorted(config.items()))) for spec in specs for config in spec.configs)
        keys.rotate(-(self._device.index * len(keys) // _DEVICES))
        with self._lock:
            if self._closed or self._ahead is not None:
                return
            self._ahead = ThreadPoolExecutor(_AHEAD_THREADS, thread_name_prefix="tokenferry-compile")
        for _ in range(_AHEAD_THREADS):
            self._go_on(self._ahead, keys)

    def warmup(self, specs: Iterable[KernelSpec]) -> None:
        """Compile and load every config of all specs, several at a time.

        Raises:
            BackendUnavailable: as ``kernel``.
        """
        with ThreadPoolExecutor(_COMPILE_THREADS) as pool:
            kernels = deque(pool.submit(self.kernel, spec, **config) for spec in specs for config in spec.configs)
            while kernels:
                kernels.popleft().result()  # no variable: the traceback of what it raises refers to this frame

    def close(self) -> None:
        """Unload all kernels. None may still run, and no CUDA graph that holds one may be replayed afterwards."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._ahead is not None:
                self._ahead.shutdown(wait=False)
            with self._device.current():
                for leave in self._leave:
                    leave()
                for module in self._modules:
                    check(self._device.cuda.cuModuleUnload(module), "unloading a kernel")
            self._modules.clear()
            self._leave.clear()
            self._kernels.clear()
            self._builds.clear()
            self._device.close()

    def _go_on(self, ahead: ThreadPoolExecutor, keys: deque[tuple[KernelSpec, _Config]]) -> None:
        """Build the next kernel in the background. One after the other, since a program waits for all at its end."""
        with contextlib.suppress(RuntimeError):  # this Jit was closed, or the program ends
            if keys:
                ahead.submit(self._build_next, ahead, keys)
            else:
                ahead.shutdown(wait=False)

    def _build_next(self, ahead: ThreadPoolExecutor, keys: deque[tuple[KernelSpec, _Config]]) -> None:
        try:
            spec, config = keys.popleft()
        except IndexError:  # the other threads have taken the rest
            self._go_on(ahead, keys)
            return
        try:
            if (spec, config) not in self._kernels:
                self._built(spec, config)
        finally:
            self._go_on(ahead, keys)

    def _built(self, spec: KernelSpec, config: _Config) -> bytes:
        """Return the cubin or PTX of a kernel that is not loaded; one thread builds it, and others wait for it."""
        with self._lock:
            build = self._builds.get((spec, config))
            mine = build is None
            if build is None:
                build = self._builds[spec, config] = Future()
        try:
            if mine:
                try:
                    build.set_result(self._build(spec, config))
                except BaseException as error:
                    with self._lock:
                        self._builds.pop((spec, config), None)  # the next call tries again
                    build.set_exception(error)
                    raise
            return build.result()
        finally:
            del build  # it keeps the error, whose traceback refers to this frame

    def _build(self, spec: KernelSpec, config: _Config) -> bytes:
        unit, version = spec.unit(dict(config), self._arch, peer_atomics=self._peer_atomics), compiler.version()
        library = self._library if spec.relocatable else None
        if library is not None:
            version = f"{version}, linked with {library.version}"
        image = self._cache.find(unit, version)
        if image is not None:
            return image
        with self._cache.one_at_a_time(unit, version):
            image = self._cache.find(unit, version)
            if image is None:
                built = self._compile(unit)
                if library is not None:
                    built = replace(built, image=link(spec.name, built.image, self._arch, library.file))
                self._cache.keep(unit, version, built)
                image = built.image
        return image

    def _load(self, spec: KernelSpec, image: bytes) -> Kernel:
        if self._closed:
            raise ClosedError(f"kernel {spec.name}: the Jit was closed; make a new one")
        with self._device.current():
            module = check(self._device.cuda.cuModuleLoadData(image), f"loading kernel {spec.name}")
            self._modules.append(module)
            if spec.relocatable and self._library is not None:
                self._library.enter(int(module))
                self._leave.append(functools.partial(self._library.leave, int(module)))
            function = check(
                self._device.cuda.cuModuleGetFunction(module, spec.symbol.encode()), f"finding kernel {spec.name}"
            )
            # The driver loads lazily: the first launch would wait for running kernels, which may wait for this one.
            check(self._device.cuda.cuFuncLoad(function), f"loading kernel {spec.name}")
        early = spec.early and bool(target(self._arch)["dependent_launch"])
        return Kernel(spec, self._device, function, early=early)
