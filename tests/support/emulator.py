"""Runs the package's kernels on the CPU, so that the tests of single kernels run where there is no GPU.

g++ compiles the same files as NVRTC, except for device/ptx.cuh, which the ptx.cuh of this folder replaces. The head of
emulator.h describes how blocks and threads run, and which faults the emulator cannot find.

A launch is a job on a stream, and a stream is a thread that runs one job after the other. Windows and all other memory
of the GPU are ordinary memory.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import queue
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from support.kernel_promises import SMEM_BYTES
from tokenferry.jit.kernel import KernelSpec
from tokenferry.jit.params import Struct
from tokenferry.kernels.all import ACROSS_NODES, SPECS

HERE = Path(__file__).parent
ARCH = "sm_90a"
"""What kernels are compiled for unless a test says so: it chooses the code that runs."""
# -O1: a build takes longer than all runs of most kernels.
OPTIONS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-fPIC", "-shared", "-pthread")

DYNAMIC = r"extern __shared__ __align__\(\d+\) u8 shared\[\];"
MAIN = """
static void emu_main(const void* p) {{ {kernel}(*(const {params}*)p); }}
extern "C" const char* run(const void* p, unsigned grid, unsigned threads, unsigned smem) {{
    return emu_run_grid(emu_main, p, grid, threads, smem);
}}
"""


def translate(name: str, text: str) -> str:
    """Return a file of the kernels in the form that g++ compiles."""
    if name == "device/ptx.cuh":
        return (HERE / "ptx.cuh").read_text()
    return re.sub(DYNAMIC, "u8* shared = emu_block->dynamic;", text)


def build(main: str, headers: dict[str, str], name: str, folder: Path) -> ctypes.CDLL:
    """Compile and load a library; one that an earlier run compiled from the same text is loaded from the folder."""
    headers = headers | {own: (HERE / own).read_text() for own in ("emulator.h", "emulator_stacks.h")}
    key = hashlib.sha256(repr((main, sorted(headers.items()), OPTIONS)).encode()).hexdigest()[:16]
    library = folder / f"{name}-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as made:
            for header, text in headers.items():
                path = Path(made, header)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            Path(made, "main.cpp").write_text(main)
            command = ["g++", *OPTIONS, "-I", made, "-o", f"{made}/kernel.so", f"{made}/main.cpp"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"g++ does not compile {name} for the emulator:\n{done.stderr[:5000]}")
            for old in folder.glob(f"{name}-*.so"):
                if old != library:  # another process may have made it meanwhile, and load it now
                    old.unlink(missing_ok=True)
            Path(made, "kernel.so").replace(library)
    return ctypes.CDLL(str(library))


class Kernel:
    """As ``tokenferry.jit.kernel.Kernel``."""

    def __init__(self, spec: KernelSpec, config: dict[str, int], folder: Path, arch: str) -> None:
        # The smallest GPUs stand for those behind PCIe, too.
        unit = spec.unit(config, arch, peer_atomics=SMEM_BYTES[arch] > 99 << 10)
        headers = {name: translate(name, text) for name, text in unit.headers.items()}
        main = (
            '#include "emulator.h"\n' + unit.text + MAIN.format(kernel=spec.entry or spec.name, params=spec.params.name)
        )
        name = "".join([spec.name, *(f"-{word}{value}" for word, value in sorted(config.items())), f"-{arch}"])
        self.spec = spec
        self._most_smem = SMEM_BYTES[arch] - spec.static_smem
        self._run = build(main, headers, name, folder).run
        self._run.restype = ctypes.c_char_p

    def new_params(self) -> Struct:
        return self.spec.params.struct()

    def launch(self, params: Struct, grid: int, block: int, smem_bytes: int, stream: int) -> None:
        assert grid >= 1
        assert block <= self.spec.max_threads
        assert block % 32 == 0
        copied = type(params).from_buffer_copy(params)
        Stream.known[stream].submit(functools.partial(self._go, copied, grid, block, smem_bytes))

    def _go(self, params: Struct, grid: int, block: int, smem_bytes: int) -> None:
        assert smem_bytes <= self._most_smem, f"kernel {self.spec.name}: {smem_bytes} bytes of shared memory"
        fault = self._run(ctypes.byref(params), grid, block, smem_bytes)
        if fault:
            raise RuntimeError(f"kernel {self.spec.name}: {fault.decode()}; no launch of it works any more")


class Jit:
    """As ``tokenferry.jit.kernel.Jit``."""

    def __init__(self, folder: Path, arch: str = ARCH) -> None:
        self._folder, self._arch = folder, arch
        self._kernels: dict[tuple[Any, ...], Kernel] = {}

    def kernel(self, spec: KernelSpec, **config: int) -> Kernel:
        key = (spec, *sorted(config.items()))
        if key not in self._kernels:
            self._kernels[key] = Kernel(spec, config, self._folder, self._arch)
        return self._kernels[key]

    def warmup(self, specs: Iterable[KernelSpec]) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for waiting in [pool.submit(self.kernel, spec, **config) for spec in specs for config in spec.configs]:
                waiting.result()


class Stream:
    """A thread that runs one job after the other. A daemon: a kernel that never ends does not keep the process."""

    known: ClassVar[dict[int, Stream]] = {}

    def __init__(self) -> None:
        self.cuda_stream = len(self.known) + 1
        self.known[self.cuda_stream] = self
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._submitted = self._done = 0
        self._error: Exception | None = None
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, job: Callable[[], None]) -> None:
        self._submitted += 1
        self._jobs.put(job)

    def query(self) -> bool:
        """Return whether all jobs are done; raise the error of a job."""
        if self._error is not None:
            raise self._error
        return self._done == self._submitted

    def _work(self) -> None:
        while True:
            try:
                self._jobs.get()()
            except Exception as error:  # noqa: BLE001 - `query` raises it
                self._error = error
            self._done += 1


class Window:
    """The part of ``tokenferry.memory.window.Window`` that virtual ranks use."""

    def __init__(self, rank: int, bases: Sequence[int], num_bytes: int) -> None:
        self.bases, self.base, self.num_bytes, self.device = bases, bases[rank], num_bytes, Emulator.device


class Emulator:
    """The machine of virtual ranks where there is no GPU; see ``Gpu`` of tests/support/virtual_ranks.py."""

    device = torch.device("cpu")
    timeout_s = 60.0
    arch = os.environ.get("EMULATE_ARCH", ARCH)
    """What its kernels are compiled for."""
    smem_bytes = SMEM_BYTES[arch]
    folder: Path | None = None
    """Folder of compiled kernels for the next run; None: they are not kept."""
    _memories: ClassVar[list[tuple[mmap.mmap, Any]]] = []
    """Kept for ever: a kernel of a failed test may still run. Untouched pages cost nothing."""

    @staticmethod
    def missing() -> str | None:
        """Return why the emulator cannot run on this machine."""
        return None if shutil.which("g++") else "needs an NVIDIA GPU, or g++ on PATH for the emulator"

    def windows(self, num_ranks: int, num_bytes: int) -> list[Window]:
        bases = []
        for _ in range(num_ranks):
            memory = mmap.mmap(-1, num_bytes)
            first = ctypes.c_char.from_buffer(memory)
            self._memories.append((memory, first))
            bases.append(ctypes.addressof(first))
        return [Window(rank, bases, num_bytes) for rank in range(num_ranks)]

    def stream(self) -> Stream:
        return Stream()

    def sleep(self, stream: Stream, milliseconds: float) -> None:
        stream.submit(lambda: time.sleep(milliseconds / 1000))

    def pinned(self, tensor: Tensor) -> Tensor:
        return tensor

    def settle(self) -> None:
        """Do nothing: only kernels run asynchronously."""

    @functools.cached_property
    def jit(self) -> Jit:
        if self.folder is None:
            self._made = tempfile.TemporaryDirectory()
        made = Jit(self.folder or Path(self._made.name), self.arch)
        made.warmup((*SPECS, *ACROSS_NODES))
        return made
