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
from contextlib import suppress
from pathlib import Path

from tokenferry.backends.cuda.across.rails import Parts

_SUCCESS = 0
_IN_PROGRESS = 7
_UINT8 = 1
_UNDEFINED = -(2**31)
_MAGIC = 0xCAFEBEEF
_LEAST_VERSION = 21800
"""2.18: the first whose communicators can be kept from occupying more than so many SMs."""
_SONAME = "libnccl.so.2"
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
    _check(library().ncclGetUniqueId(ctypes.byref(unique_id)), "ncclGetUniqueId")
    return bytes(unique_id)


class Communicator:
    """One rank's end of a communicator.

    Making one is collective, and blocks until all ranks have come, without a deadline; see `connect` of
    `tokenferry.backends.cuda.across.nccl_channel`. Calls of NCCL that return before they have ended would allow for
    deadlines, but make a thread each: an exchange takes the host 55 us instead of 10.

    Args:
        rank: This rank, in the communicator.
        num_ranks: How many there are.
        unique_id: As `new_unique_id` returned it on one of them.
        max_ctas: Most SMs that an exchange occupies.

    Raises:
        NcclError: it failed.
    """

    def __init__(self, rank: int, num_ranks: int, unique_id: bytes, *, max_ctas: int) -> None:
        self._nccl = nccl = library()
        self.rank, self.num_ranks = rank, num_ranks
        self._lock = threading.Lock()
        config = _Config(
            ctypes.sizeof(_Config), _MAGIC, _LEAST_VERSION, 1, _UNDEFINED, _UNDEFINED, max_ctas, None, _UNDEFINED
        )
        comm = ctypes.c_void_p()
        result = nccl.ncclCommInitRankConfig(
            ctypes.byref(comm), num_ranks, _UniqueId.from_buffer_copy(unique_id), rank, ctypes.byref(config)
        )
        _check(result, "ncclCommInitRankConfig")
        self._comm = comm.value

    def exchange(self, parts: Parts, stream: int) -> None:
        """Send and receive, on a stream; nodes are ranks here.

        Blocks the first time that a rank is among the peers, until it has come.

        Raises:
            NcclError: the communicator has failed or was aborted.
        """
        nccl = self._nccl
        with self._lock:
            comm = self._comm
            if comm is None:
                raise NcclError("the communicator was aborted")
            _check(nccl.ncclGroupStart(), "ncclGroupStart")
            failed = _SUCCESS
            for address, num_bytes, peer, is_sent in parts:
                function = nccl.ncclSend if is_sent else nccl.ncclRecv
                failed = function(address, num_bytes, _UINT8, peer, comm, stream) or failed
            ended = nccl.ncclGroupEnd()  # in any case: else the group of this thread stays open
            _check(failed or ended, "an exchange")

    def error(self) -> str:
        """Return what has gone wrong since, such as a connection that broke; empty: nothing, or a call is under way."""
        if not self._lock.acquire(blocking=False):
            return ""
        try:
            comm, state = self._comm, ctypes.c_int()
            if comm is None:
                return ""
            result = self._nccl.ncclCommGetAsyncError(comm, ctypes.byref(state)) or state.value
            return "" if result in (_SUCCESS, _IN_PROGRESS) else _text(result)
        finally:
            self._lock.release()

    def abort(self) -> None:
        """End what is under way, on the device and in other threads. Idempotent."""
        comm = self._take()
        if comm is not None:
            self._nccl.ncclCommAbort(comm)

    def close(self) -> None:
        """Wait until what was sent has left, and free the communicator. Idempotent.

        Not if a CUDA graph has captured an exchange: NCCL would wait for the end of the graph.
        """
        comm = self._take()
        if comm is None:
            return
        if self._nccl.ncclCommFinalize(comm) == _SUCCESS:
            self._nccl.ncclCommDestroy(comm)
        else:
            self._nccl.ncclCommAbort(comm)

    def _take(self) -> int | None:
        """Return the communicator to the one who may end it; None: that was another."""
        # A call may block on a peer that does not come or a device that hangs, which only an abort can end.
        locked = self._lock.acquire(timeout=_LOCK_S)
        comm, self._comm = self._comm, None
        if locked:
            self._lock.release()
        return comm


def _check(result: int, what: str) -> None:
    if result != _SUCCESS:
        raise NcclError(f"{what}: {_text(result)}")


def _text(result: int) -> str:
    nccl = library()
    last = nccl.ncclGetLastError(None).decode(errors="replace").strip()
    return f"{nccl.ncclGetErrorString(result).decode()}{f' ({last})' if last else ''}"
