"""NVRTC: from a translation unit to a cubin or PTX, in memory, without a GPU and without nvcc."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any

from tokenferry.errors import BackendUnavailable
from tokenferry.jit.driver import bindings, check
from tokenferry.jit.source import Unit

_LOG_LINES = 20


@dataclass(frozen=True)
class Built:
    """A compiled unit: the cubin, or PTX, and the log of the compiler and the assembler."""

    image: bytes
    log: str


def version() -> str:
    """Return the version of NVRTC, such as ``"13.0.88"``; from its package if there is one, else by loading it.

    Raises:
        BackendUnavailable: NVRTC is not installed.
    """
    try:
        return importlib.metadata.version("nvidia-cuda-nvrtc")
    except importlib.metadata.PackageNotFoundError:
        return ".".join(map(str, check(_load().nvrtcVersion(), "nvrtcVersion")))


def compile_unit(unit: Unit) -> Built:
    """Compile one translation unit; takes 20 to 100 ms, releases the GIL, and is thread-safe.

    Raises:
        BackendUnavailable: NVRTC is not installed, or reports errors; gives the first lines of its log.
    """
    nvrtc = _load()
    names = sorted(unit.headers)
    program = check(
        nvrtc.nvrtcCreateProgram(
            unit.text.encode(),
            f"{unit.name}.cu".encode(),
            len(names),
            [unit.headers[name].encode() for name in names],
            [name.encode() for name in names],
        ),
        f"creating the program of kernel {unit.name}",
    )
    try:
        (code,) = nvrtc.nvrtcCompileProgram(program, len(unit.options), [option.encode() for option in unit.options])
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0\n ").decode()
        if int(code) != 0:
            first = "\n".join(log.splitlines()[:_LOG_LINES])
            raise BackendUnavailable(f"kernel {unit.name}: NVRTC {version()} cannot compile it ({code.name}):\n{first}")
        if unit.is_ptx:
            return Built(_text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program), log)
        return Built(_text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _load() -> Any:  # noqa: ANN401 - a module without types
    """Return the module cuda.bindings.nvrtc, after checking that it can load its library."""
    nvrtc = bindings("nvrtc")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        raise BackendUnavailable(
            f"CUDA: cannot load NVRTC ({error}). The CUDA builds of torch bring it; "
            "else: pip install 'nvidia-cuda-nvrtc==13.*'"
        ) from error
    return nvrtc


def _text(size: Any, read: Any, program: Any) -> bytes:  # noqa: ANN401 - functions without types
    data = bytearray(check(size(program), size.__name__))
    check(read(program, data), read.__name__)
    return bytes(data)
