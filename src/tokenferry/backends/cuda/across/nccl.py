"""The few functions of NCCL that rails need, called in the library that torch brings.

`torch.distributed` would do, but an exchange through it takes the host several times as long, it ends the process when
a connection fails, and its communicators live until the process ends. The functions are those of NCCL's documentation:
https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_SUCCESS = 0
_IN_PROGRESS = 7
_UINT8 = 1
_UNDEFINED = -(2**31)
_MAGIC = 0xCAFEBEEF
_LEAST_VERSION = 21800
"""2.18: the first with communicators whose calls return before they have ended, as deadlines need them."""
_SONAME = "libnccl.so.2"
_POLL_S = 0.0002
_FINISH_S = 5.0
"""Most seconds to wait until what was sent has left."""
_LOCK_S = 1.0
"""Most seconds for which a communicator is not aborted because a call of NCCL has not returned."""


class NcclError(RuntimeError):
    """A function of NCCL has failed; the message says which one and what NCCL says."""


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_ubyte * 128),)


class _Config(ctypes.Structure):
    """``ncclConfig_t`` of version 2.18; later versions read it as what it is, by its size and version."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
    )


_FUNCTIONS = {
    "ncclGetVersion": (ctypes.POINTER(ctypes.c_int),),
    "ncclGetUniqueId": (ctypes.POINTER(_UniqueId),),
    "ncclCommInitRankConfig": (
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_int,
        _UniqueId,
        ctypes.c_int,
        ctypes.POINTER(_Config),
    ),
    "ncclCommGetAsyncError": (ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)),
    "ncclCommFinalize": (ctypes.c_void_p,),
    "ncclCommDestroy": (ctypes.c_void_p,),
    "ncclCommAbort": (ctypes.c_void_p,),
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
    "ncclSend": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
    "ncclRecv": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
}


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library, with the types of its functions.

    Raises:
        NcclError: it was not found, or is too old.
    """
    nccl = _load()
    for name, types in _FUNCTIONS.items():
        function = getattr(nccl, name)
        function.argtypes, function.restype = types, ctypes.c_int
    for name in ("ncclGetErrorString", "ncclGetLastError"):
        getattr(nccl, name).restype = ctypes.c_char_p
    nccl.ncclGetErrorString.argtypes, nccl.ncclGetLastError.argtypes = (ctypes.c_int,), (ctypes.c_void_p,)
    version = ctypes.c_int()
    nccl.ncclGetVersion(ctypes.byref(version))
    if version.value < _LEAST_VERSION:
        raise NcclError(
            f"NCCL {version.value // 10000}.{version.value // 100 % 100} is too old: 2.18 or later is needed"
        )
    return nccl


def _load() -> ctypes.CDLL:
    with suppress(OSError):
        return ctypes.CDLL(_SONAME)  # the one that torch has loaded
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package else ():
        for file in Path(folder).glob(f"*/lib/{_SONAME}"):
            with suppress(OSError):
                return ctypes.CDLL(str(file))
    raise NcclError(f"{_SONAME} was not found; CUDA builds of torch from PyPI bring it")


def why_not() -> str:
    """Return why NCCL cannot be used; empty if it can."""
    try:
        library()
    except (NcclError, AttributeError) as error:
        return str(error)
    return ""


def new_unique_id() -> bytes:
    """Return what the ranks of one communicator have in common; one of them makes it.

    Raises:
        NcclError: such as for want of a network interface.
    """
    unique_id = _UniqueId()
    _check(library().ncclGetUniqueId(ctypes.byref(unique_id)), "ncclGetUniqueId", None)
    return bytes(unique_id)


class Part(NamedTuple):
    """Memory to send, or to receive into.

    Attributes:
        address: Where it begins.
        num_bytes: Its bytes.
        peer: The other rank, in the communicator.
        is_sent: Whether it is sent.
    """

    address: int
    num_bytes: int
    peer: int
    is_sent: bool


class Communicator:
    """One rank's end of a communicator. Its calls return before they have ended; all waits are ours.

    Making one is collective, and blocks until all ranks have come.

    Args:
        rank: This rank, in the communicator.
        num_ranks: How many there are.
        unique_id: As `new_unique_id` returned it on one of them.
        max_ctas: Most SMs that an exchange occupies.
        timeout_s: Seconds that connecting may take.

    Raises:
        NcclError: it failed, or took too long.
    """

    def __init__(self, rank: int, num_ranks: int, unique_id: bytes, *, max_ctas: int, timeout_s: float) -> None:
        self._nccl = library()
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._comm: int | None = None
        config = _Config(
            ctypes.sizeof(_Config), _MAGIC, _LEAST_VERSION, 0, _UNDEFINED, _UNDEFINED, max_ctas, None, _UNDEFINED
        )
        comm = ctypes.c_void_p()
        result = self._nccl.ncclCommInitRankConfig(
            ctypes.byref(comm), num_ranks, _UniqueId.from_buffer_copy(unique_id), rank, ctypes.byref(config)
        )
        self._comm = comm.value
        try:
            self._settle(self._comm, result, "ncclCommInitRankConfig", timeout_s)
        except NcclError:
            self.abort()
            raise

    def exchange(self, parts: Sequence[Part], stream: int) -> None:
        """Send and receive, on a stream.

        Raises:
            NcclError: the communicator has failed or was aborted, or peers did not connect in time.
        """
        nccl = self._nccl
        with self._lock:
            comm = self._comm
            if comm is None:
                raise NcclError("the communicator was aborted")
            _check(nccl.ncclGroupStart(), "ncclGroupStart", comm)
            failed = _SUCCESS
            for address, num_bytes, peer, is_sent in parts:
                function = nccl.ncclSend if is_sent else nccl.ncclRecv
                result = function(address, num_bytes, _UINT8, peer, comm, stream)
                if result != _IN_PROGRESS:  # then the end of the group says how it went
                    failed = failed or result
            ended = nccl.ncclGroupEnd()
            self._settle(comm, failed or ended, "an exchange", self._timeout_s)

    def error(self) -> str:
        """Return what has gone wrong since, such as a connection that broke; empty: nothing, or a call is under way."""
        if not self._lock.acquire(blocking=False):  # asking also ends calls of NCCL: one thread at a time may do so
            return ""
        try:
            comm, state = self._comm, ctypes.c_int()
            if comm is None:
                return ""
            result = self._nccl.ncclCommGetAsyncError(comm, ctypes.byref(state)) or state.value
            return "" if result in (_SUCCESS, _IN_PROGRESS) else _text(result, comm)
        finally:
            self._lock.release()

    def abort(self) -> None:
        """End what is under way, on the device as well. Idempotent."""
        comm = self._take()
        if comm is not None:
            self._nccl.ncclCommAbort(comm)

    def close(self) -> None:
        """Wait until what was sent has left, and free the communicator. Idempotent; takes seconds at most.

        Not if a CUDA graph has captured an exchange: NCCL would wait for the end of the graph.
        """
        comm = self._take()
        if comm is None:
            return
        try:
            self._settle(comm, self._nccl.ncclCommFinalize(comm), "ncclCommFinalize", _FINISH_S)
        except NcclError:
            self._nccl.ncclCommAbort(comm)
        else:
            self._nccl.ncclCommDestroy(comm)

    def _take(self) -> int | None:
        """Return the communicator to the one who may end it; None: that was another."""
        # A launch may block on a device that hangs, which only an abort can end.
        locked = self._lock.acquire(timeout=_LOCK_S)
        comm, self._comm = self._comm, None
        if locked:
            self._lock.release()
        return comm

    def _settle(self, comm: int | None, result: int, what: str, timeout_s: float) -> None:
        """Wait until a call has ended; raise if it has failed, or the communicator was aborted meanwhile."""
        until, state, mine = time.monotonic() + timeout_s, ctypes.c_int(), self._comm
        while result == _IN_PROGRESS:
            if self._comm != mine:
                raise NcclError(f"{what}: the communicator was aborted")
            if time.monotonic() > until:
                raise NcclError(f"{what} did not end within {timeout_s:.0f} s")
            result = self._nccl.ncclCommGetAsyncError(comm, ctypes.byref(state)) or state.value
            if result == _IN_PROGRESS:
                time.sleep(_POLL_S)
        _check(result, what, comm)


def _check(result: int, what: str, comm: int | None) -> None:
    if result != _SUCCESS:
        raise NcclError(f"{what}: {_text(result, comm)}")


def _text(result: int, comm: int | None) -> str:
    nccl = library()
    last = nccl.ncclGetLastError(comm).decode(errors="replace").strip()
    return f"{nccl.ncclGetErrorString(result).decode()}{f' ({last})' if last else ''}"
