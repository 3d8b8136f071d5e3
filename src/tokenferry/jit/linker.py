"""nvJitLink: links relocatable kernels with a library of device functions, in memory, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tokenferry.errors import BackendUnavailable
from tokenferry.jit.driver import bindings

_LOG_CHARACTERS = 2000


class DeviceLibrary(Protocol):
    """A library of device functions, and what it does with the modules that are linked with it."""

    @property
    def file(self) -> Path:
        """The library."""
        ...

    @property
    def version(self) -> str:
        """Its version, which tells linked kernels apart in the cache."""
        ...

    def enter(self, module: int) -> None:
        """Prepare a module that has just been loaded; its context is current."""
        ...

    def leave(self, module: int) -> None:
        """Undo that, before the module is unloaded."""
        ...


def link(name: str, cubin: bytes, arch: str, library: Path) -> bytes:
    """Return the cubin of a kernel, linked with a library of device functions; takes 10 to 30 ms.

    Args:
        name: The kernel, for messages.
        cubin: What the compiler made of it, relocatable.
        arch: The architecture, such as ``"sm_90a"``.
        library: A static library, with code for this architecture.

    Raises:
        BackendUnavailable: nvJitLink is not installed, or reports errors; gives the beginning of its log.
    """
    linker = _load()
    handle = linker.create(1, [f"-arch={arch}"])
    try:
        linker.add_data(handle, linker.InputType.CUBIN, cubin, len(cubin), name)
        linker.add_file(handle, linker.InputType.LIBRARY, str(library))
        linker.complete(handle)
        return _text(handle, linker.get_linked_cubin_size, linker.get_linked_cubin)
    except linker.nvJitLinkError as error:
        log = _text(handle, linker.get_error_log_size, linker.get_error_log).rstrip(b"\0\n ").decode()
        raise BackendUnavailable(
            f"kernel {name}: nvJitLink cannot link it with {library} ({error}):\n{log[:_LOG_CHARACTERS]}"
        ) from error
    finally:
        linker.destroy(handle)


def why_not() -> str:
    """Return why nvJitLink cannot be used; empty if it can."""
    try:
        _load()
    except BackendUnavailable as error:
        return str(error)
    return ""


def _load() -> Any:  # noqa: ANN401 - a module without types
    """Return the module cuda.bindings.nvjitlink, after checking that it can load its library."""
    linker = bindings("nvjitlink")
    try:
        linker.version()
    except RuntimeError as error:
        raise BackendUnavailable(
            f"CUDA: cannot load nvJitLink ({error}). The CUDA builds of torch bring it; "
            "else: pip install 'nvidia-nvjitlink==13.*'"
        ) from error
    return linker


def _text(handle: int, size: Callable[[int], int], read: Callable[[int, bytearray], None]) -> bytes:
    data = bytearray(size(handle))
    read(handle, data)
    return bytes(data)
