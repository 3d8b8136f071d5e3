"""NVSHMEM as the network of decode calls: memory that ranks put into, and the library that kernels are linked with.

The functions of its host library are those of its documentation: https://docs.nvidia.com/nvshmem/api/. A process
initialises it once, for the ranks of its first group. Its memory is never given back: that would be collective, and a
rank must be able to leave alone.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from tokenferry.backends.cuda.across.puts import Network, RegionSizes
from tokenferry.errors import BackendUnavailable
from tokenferry.jit import linker
from tokenferry.kernels.rail_receive.spec import SPEC as RECEIVE
from tokenferry.kernels.rail_send.spec import SPEC as SEND
from tokenferry.memory.tensor import bytes_at
from tokenferry.topology import Topology
from tokenferry.transports.handshake import Bootstrap, agree

_VERSION = (3, 4)
"""Later versions have renamed the device functions that device/nvshmem.cuh declares."""
_HOST, _DEVICE = "libnvshmem_host.so.3", "libnvshmem_device.a"
_BY_UNIQUE_ID = 1 << 3
_INITIALISED = 2
_ALIGNMENT = 512
_T = TypeVar("_T")


class NvshmemError(RuntimeError):
    """A function of NVSHMEM has failed, or did not return; the message says which one."""


class _UniqueId(ctypes.Structure):
    _fields_ = (("version", ctypes.c_int), ("internal", ctypes.c_ubyte * 124))


class _UniqueIdArgs(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_int),
        ("id", ctypes.POINTER(_UniqueId)),
        ("my_rank", ctypes.c_int),
        ("num_ranks", ctypes.c_int),
    )


class _InitArgs(ctypes.Structure):
    _fields_ = (("version", ctypes.c_int), ("unique_id", _UniqueIdArgs), ("content", ctypes.c_ubyte * 96))


class _Attributes(ctypes.Structure):
    _fields_ = (("version", ctypes.c_int), ("mpi_comm", ctypes.c_void_p), ("args", _InitArgs))


_FUNCTIONS: dict[str, tuple[object, ...]] = {
    "nvshmemx_vendor_get_version_info": (ctypes.POINTER(ctypes.c_int),) * 3,
    "nvshmemx_init_status": (),
    "nvshmemx_get_uniqueid": (ctypes.POINTER(_UniqueId),),
    "nvshmemx_set_attr_uniqueid_args": (
        *(ctypes.c_int, ctypes.c_int),
        *(ctypes.POINTER(_UniqueId), ctypes.POINTER(_Attributes)),
    ),
    "nvshmemx_hostlib_init_attr": (ctypes.c_uint, ctypes.POINTER(_Attributes)),
    "nvshmem_my_pe": (),
    "nvshmem_n_pes": (),
    "nvshmemx_cumodule_init": (ctypes.c_void_p,),
    "nvshmemx_cumodule_finalize": (ctypes.c_void_p,),
}
_POINTERS = {
    "nvshmem_align": (ctypes.c_size_t, ctypes.c_size_t),
    "nvshmem_ptr": (ctypes.c_void_p, ctypes.c_int),
}


@functools.cache
def library() -> ctypes.CDLL:
    """Return the host library, with the types of its functions.

    Raises:
        NvshmemError: it was not found, or is of another version than the kernels are written for.
    """
    file = folder() / _HOST
    try:
        found = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise NvshmemError(f"{file} cannot be loaded: {error}") from error
    for name, types in (_FUNCTIONS | _POINTERS).items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, ctypes.c_void_p if name in _POINTERS else ctypes.c_int
    version = version_of(found)
    if version[:2] != _VERSION:
        raise NvshmemError(
            f"NVSHMEM {'.'.join(map(str, version))} was found, and {'.'.join(map(str, _VERSION))} is needed, which "
            "torch 2.11 to 2.14 bring; pip install 'nvidia-nvshmem-cu13==3.4.*'"
        )
    return found


def version_of(found: ctypes.CDLL) -> tuple[int, int, int]:
    """Return the version of a library."""
    words = [ctypes.c_int() for _ in range(3)]
    found.nvshmemx_vendor_get_version_info(*map(ctypes.byref, words))
    return words[0].value, words[1].value, words[2].value


def folder() -> Path:
    """Return the folder of both libraries.

    Raises:
        NvshmemError: they were not found.
    """
    package = importlib.util.find_spec("nvidia")
    for place in (package.submodule_search_locations or ()) if package else ():
        found = Path(place, "nvshmem", "lib")
        if (found / _HOST).exists() and (found / _DEVICE).exists():
            return found
    raise NvshmemError(
        f"{_HOST} and {_DEVICE} were not found; CUDA builds of torch from PyPI bring them, else: pip install "
        "'nvidia-nvshmem-cu13==3.4.*'"
    )


def why_not() -> str:
    """Return why NVSHMEM cannot be used; empty if it can, as far as a single process knows."""
    try:
        library()
    except (NvshmemError, AttributeError) as error:
        return str(error)
    return linker.why_not()


@dataclass(frozen=True, slots=True)
class NvshmemDevice:
    """The device library; see `tokenferry.jit.linker.DeviceLibrary`.

    Attributes:
        file: The library.
        version: Its version.
    """

    file: Path
    version: str

    @classmethod
    def find(cls) -> NvshmemDevice:
        """Return that of the host library."""
        return cls(folder() / _DEVICE, f"NVSHMEM {'.'.join(map(str, version_of(library())))}")

    def enter(self, module: int) -> None:
        """See `DeviceLibrary.enter`: NVSHMEM writes its state into the module.

        Raises:
            BackendUnavailable: it refuses, such as for another version.
        """
        result = library().nvshmemx_cumodule_init(module)
        if result:
            raise BackendUnavailable(f"NVSHMEM: nvshmemx_cumodule_init failed with status {result}")

    def leave(self, module: int) -> None:
        """See `DeviceLibrary.leave`."""
        library().nvshmemx_cumodule_finalize(module)


def make_network(
    bootstrap: Bootstrap, topology: Topology, sizes: RegionSizes, device: torch.device, timeout_s: float
) -> Network:
    """Return the network of a rank: initialise NVSHMEM if nobody has, and take memory. Collective.

    Args:
        bootstrap: Exchanges handshakes of all ranks.
        topology: The nodes.
        sizes: The sizes of the memory.
        device: The GPU of this rank.
        timeout_s: Seconds that handshakes may take; what NVSHMEM does may take half as long.

    Raises:
        NvshmemError: it failed on a rank, or did not end; the same on all ranks.
    """
    found = library()
    unique_id = _agree_on_id(bootstrap, topology, found)
    region, reason = 0, ""

    def take() -> int:
        torch.cuda.set_device(device)  # of this thread
        return _take(found, topology, unique_id, sizes.num_bytes)

    try:
        region = _in_time(take, timeout_s / 2)
        bytes_at(region, sizes.num_bytes, device, None).zero_()
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        reason = f"rank {topology.rank}: {error}"
    reason = agree(bootstrap, reason)  # from here on all have zeroed theirs
    if reason:
        raise NvshmemError(reason)
    pes = [handshake["pe"] for handshake in bootstrap.exchange({"pe": found.nvshmem_my_pe()})]
    mapped = [0 if rank == topology.rank else found.nvshmem_ptr(region, pes[rank]) or 0 for rank in topology.rail]
    words = [*mapped, *(pes[rank] for rank in topology.rail), 0]
    made: Network | None = None
    try:
        addresses = torch.tensor(words, dtype=torch.int64, device=device)
        made = Network("nvshmem", SEND, RECEIVE, sizes, region, addresses, library=NvshmemDevice.find())
    except (RuntimeError, OSError) as error:
        reason = f"rank {topology.rank}: {error}"
    reason = agree(bootstrap, reason)  # the next exchange of all ranks is another one
    if made is None or reason:
        raise NvshmemError(reason)
    return made


def _agree_on_id(bootstrap: Bootstrap, topology: Topology, found: ctypes.CDLL) -> bytes:
    """Return the unique id with which the ranks initialise NVSHMEM; empty if all have. Collective.

    Raises:
        NvshmemError: some have, or there is none; the same on all ranks.
    """
    is_initialised = found.nvshmemx_init_status() >= _INITIALISED
    mine, why_not = "", ""
    if topology.rank == 0 and not is_initialised:
        unique_id = _UniqueId(version=_version(_UniqueId))
        result = found.nvshmemx_get_uniqueid(ctypes.byref(unique_id))
        mine, why_not = bytes(unique_id).hex(), f"nvshmemx_get_uniqueid failed with status {result}" if result else ""
    handshakes = bootstrap.exchange({"unique_id": mine, "is_initialised": is_initialised, "why_not": why_not})
    if handshakes[0]["why_not"]:
        raise NvshmemError(f"rank 0: {handshakes[0]['why_not']}")
    if len({handshake["is_initialised"] for handshake in handshakes}) > 1:
        raise NvshmemError("NVSHMEM is initialised in some processes of the group, and not in others")
    return bytes.fromhex(handshakes[0]["unique_id"])


def _take(found: ctypes.CDLL, topology: Topology, unique_id: bytes, num_bytes: int) -> int:
    """Initialise NVSHMEM, unless there is no unique id, and return memory: collective, and blocks."""
    if unique_id:
        _initialise(found, topology, unique_id)
    num_processes = found.nvshmem_n_pes()
    if num_processes != topology.num_ranks:
        raise NvshmemError(
            f"NVSHMEM is initialised for {num_processes} processes, and the group has {topology.num_ranks} ranks; it "
            "takes groups of all these processes"
        )
    address: int | None = found.nvshmem_align(_ALIGNMENT, num_bytes)
    if not address:
        raise NvshmemError(
            f"nvshmem_align has no memory for {num_bytes / 2**20:.1f} MiB; set NVSHMEM_SYMMETRIC_SIZE higher"
        )
    return address


def _initialise(found: ctypes.CDLL, topology: Topology, unique_id: bytes) -> None:
    given = _UniqueId.from_buffer_copy(unique_id)
    attributes = _Attributes(version=_version(_Attributes))
    attributes.args.version = _version(_InitArgs)
    attributes.args.unique_id.version = _version(_UniqueIdArgs)
    result = found.nvshmemx_set_attr_uniqueid_args(
        topology.rank, topology.num_ranks, ctypes.byref(given), ctypes.byref(attributes)
    )
    if result:
        raise NvshmemError(f"nvshmemx_set_attr_uniqueid_args failed with status {result}")
    result = found.nvshmemx_hostlib_init_attr(_BY_UNIQUE_ID, ctypes.byref(attributes))
    if result:
        raise NvshmemError(
            f"nvshmemx_hostlib_init_attr failed with status {result}; each rank needs NVLink or a network card to "
            "every other one, and NVSHMEM_DEBUG=INFO shows what NVSHMEM finds"
        )


def _version(kind: type[ctypes.Structure]) -> int:
    """Return what NVSHMEM wants in the field ``version`` of a struct."""
    return (1 << 16) + ctypes.sizeof(kind)


def _in_time(work: Callable[[], _T], timeout_s: float) -> _T:
    """Return what a collective function of NVSHMEM gives, which has no deadline; its thread may stay in it.

    Raises:
        NvshmemError: it failed, or took too long.
    """
    done: list[_T] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:  # noqa: BLE001 - raised below
            failures.append(error)

    thread = threading.Thread(target=run, name="tokenferry-nvshmem", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if failures:
        raise failures.pop()  # not from a variable: its traceback holds this frame
    if not done:
        raise NvshmemError(f"NVSHMEM did not connect the ranks within {timeout_s:.0f} s")
    return done[0]
