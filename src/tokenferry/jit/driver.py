"""Access to cuda.bindings: import it on first use, and check the results of its functions."""

from __future__ import annotations

import importlib
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenferry.errors import BackendUnavailable


def bindings(name: str = "driver") -> Any:  # noqa: ANN401 - a module without types
    """Return the module ``cuda.bindings.<name>``, such as ``driver`` or ``nvrtc``.

    Raises:
        BackendUnavailable: cuda-bindings is not installed; says what to install.
    """
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise BackendUnavailable(
            f"CUDA: cannot import cuda.bindings.{name} ({error}). The CUDA builds of torch bring it; "
            "else: pip install 'cuda-bindings==13.*'"
        ) from error


def check(result: tuple[Any, ...], what: str) -> Any:  # noqa: ANN401 - what the CUDA function returned
    """Check the error code that a function of cuda.bindings returned, and return its values.

    Args:
        result: ``(code, ...)`` as the function returned it.
        what: The action, for the message, such as ``"launch of kernel dispatch"``.

    Returns:
        None, the one value, or the tuple of values after the code.

    Raises:
        BackendUnavailable: the code is not 0; names ``what`` and the code.
    """
    code, *values = result
    if int(code) != 0:
        raise BackendUnavailable(f"CUDA: {what} failed: {name_of(code)}")
    return values[0] if len(values) == 1 else tuple(values) or None


def name_of(code: Any) -> str:  # noqa: ANN401 - an enum of cuda.bindings
    """Return the name and number of an error code, such as ``"CUDA_ERROR_INVALID_VALUE (1)"``."""
    return f"{getattr(code, 'name', type(code).__name__)} ({int(code)})"


def has_peer_atomics(one: int, other: int) -> bool:
    """Return whether atomics of one GPU on the memory of another are atomic: over NVLink they are, over PCIe not.

    Args:
        one: Index of the GPU that executes them.
        other: Index of the GPU that has the memory, which ``one`` can access.

    Raises:
        BackendUnavailable: cuda-bindings is not installed, or the driver reported an error.
    """
    cuda = bindings()
    check(cuda.cuInit(0), "cuInit")
    first, second = (check(cuda.cuDeviceGet(index), f"opening CUDA device {index}") for index in (one, other))
    kind = cuda.CUdevice_P2PAttribute.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
    what = f"asking about the link of CUDA devices {one} and {other}"
    return bool(check(cuda.cuDeviceGetP2PAttribute(kind, first, second), what))


class Device:
    """One GPU and its primary context, which torch uses too.

    The context is retained until `close`, or as long as this object: what needs the context keeps its `Device`.

    A forked child has no context: destructors there call nothing of CUDA (``inherited``).

    Raises:
        BackendUnavailable: cuda-bindings, the driver, or a device with this index is missing.
    """

    def __init__(self, index: int) -> None:
        self._pid = os.getpid()
        self.cuda = bindings()
        try:
            check(self.cuda.cuInit(0), "cuInit")
        except RuntimeError as error:  # cuda.bindings raises this where there is no libcuda
            if isinstance(error, BackendUnavailable):
                raise
            raise BackendUnavailable(f"CUDA: no driver on this machine ({error}); install an NVIDIA driver") from error
        self.index = index
        self._handle = check(self.cuda.cuDeviceGet(index), f"opening CUDA device {index}")
        self._context = check(
            self.cuda.cuDevicePrimaryCtxRetain(self._handle), f"opening the context of CUDA device {index}"
        )
        self._release = weakref.finalize(self, _release, self.cuda, self._handle, os.getpid())
        self._release.atexit = False  # the process ends, and with it every context

    @property
    def inherited(self) -> bool:
        """Whether another process made this object, from which this one was forked."""
        return os.getpid() != self._pid

    def arch(self) -> str:
        """Return the architecture of this GPU: ``"sm_80"``, or from Hopper on its own variant, ``"sm_90a"``."""
        major = self._attribute("COMPUTE_CAPABILITY_MAJOR", "the compute capability")
        minor = self._attribute("COMPUTE_CAPABILITY_MINOR", "the compute capability")
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"

    def smem_bytes(self) -> int:
        """Return how much shared memory a block may have: 227 KB on Hopper, 99 KB on the smallest."""
        return self._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN", "the shared memory of a block")

    def _attribute(self, name: str, what: str) -> int:
        kind = getattr(self.cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(check(self.cuda.cuDeviceGetAttribute(kind, self._handle), f"asking for {what}"))

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current in this thread inside the ``with`` block; restore the previous one."""
        check(self.cuda.cuCtxPushCurrent(self._context), "entering the CUDA context")
        try:
            yield
        finally:
            check(self.cuda.cuCtxPopCurrent(), "leaving the CUDA context")

    def close(self) -> None:
        """Release the context; torch holds a reference of its own. Idempotent."""
        result = self._release()
        if result is not None:
            check(result, "releasing the CUDA context")


def _release(cuda: Any, handle: Any, pid: int) -> Any:  # noqa: ANN401 - a module and objects without types
    """Release the context, unless this is a forked child, which has none; return the result."""
    return cuda.cuDevicePrimaryCtxRelease(handle) if os.getpid() == pid else None
