"""NVSHMEM over a library that is a stand-in: how ranks agree, what they take, and what they say if they cannot."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenferry.backends.cuda.across import nvshmem
from tokenferry.backends.cuda.across.nvshmem import NvshmemDevice, NvshmemError, make_network
from tokenferry.backends.cuda.across.puts import RegionSizes
from tokenferry.errors import BackendUnavailable
from tokenferry.topology import Topology, consecutive

NODES = consecutive(4, 2)
SIZES = RegionSizes(2, 256, 1)
CPU = torch.device("cpu")
THREAD = threading.local()
"""``THREAD.rank``: the rank that a thread stands for."""


class Library:
    """NVSHMEM's functions for one process, which note their calls and return what they are told to."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.calls: list[str] = []
        self.results: dict[str, int] = {}
        self.num_processes = 4
        self.memory = ctypes.create_string_buffer(b"\xee" * SIZES.num_bytes, SIZES.num_bytes)
        self.unique_id = b""
        self.blocks = threading.Event()
        self.blocks.set()

    def __getattr__(self, name: str) -> Callable[..., int]:
        def function(*args: object) -> int:
            self.calls.append(name)
            return self.results.get(name, 0)

        return function

    def nvshmemx_get_uniqueid(self, unique_id: Any) -> int:
        unique_id._obj.internal[:3] = b"one"
        return self.results.get("nvshmemx_get_uniqueid", 0)

    def nvshmemx_set_attr_uniqueid_args(self, rank: int, num_ranks: int, unique_id: Any, attributes: Any) -> int:
        assert (rank, num_ranks) == (self.rank, 4)
        self.unique_id = bytes(unique_id._obj.internal[:3])
        for struct in (unique_id._obj, attributes._obj, attributes._obj.args, attributes._obj.args.unique_id):
            assert struct.version == (1 << 16) + ctypes.sizeof(struct)
        return 0

    def nvshmemx_hostlib_init_attr(self, flags: int, _attributes: object) -> int:
        self.calls.append("init")
        assert flags == 8
        self.blocks.wait(5.0)
        return self.results.get("nvshmemx_hostlib_init_attr", 0)

    def nvshmem_my_pe(self) -> int:
        return 10 + self.rank

    def nvshmem_n_pes(self) -> int:
        return self.num_processes

    def nvshmem_align(self, _alignment: int, num_bytes: int) -> int | None:
        assert num_bytes == SIZES.num_bytes
        return self.results.get("nvshmem_align", ctypes.addressof(self.memory)) or None

    def nvshmem_ptr(self, address: int, pe: int) -> int | None:
        """Return where the memory of ranks 2 and 3 is mapped; that of others is not."""
        return address + (1 << 20) if pe >= 12 else None


class Table:
    """Exchanges handshakes of threads."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks)
        self._said: list[dict[str, Any]] = [{}] * num_ranks

    def of(self, rank: int) -> Any:
        """Return the table of a rank."""
        table, said, barrier = type("RankTable", (), {})(), self._said, self._barrier

        def exchange(handshake: dict[str, Any]) -> list[dict[str, Any]]:
            said[rank] = handshake
            barrier.wait(10.0)
            found = list(said)
            barrier.wait(10.0)
            return found

        table.exchange = exchange
        return table


@pytest.fixture
def libraries(monkeypatch) -> list[Library]:
    """The library of each rank, which is a thread."""
    made = [Library(rank) for rank in range(4)]
    monkeypatch.setattr(nvshmem, "library", lambda: made[THREAD.rank])
    monkeypatch.setattr(NvshmemDevice, "find", lambda: NvshmemDevice(Path("library.a"), "NVSHMEM 3.4.5"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    return made


def make(timeout_s: float = 20.0) -> list[Any]:
    """Return the network of each rank, or the error that it raised."""
    table = Table(4)

    def of_rank(rank: int) -> Any:
        THREAD.rank = rank
        try:
            return make_network(table.of(rank), Topology(rank, NODES), SIZES, CPU, timeout_s)
        except NvshmemError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(of_rank, range(4)))


def test_ranks_initialise_it_together_and_take_memory(libraries):
    """The table has the memory of the rail peer if it is mapped, and the number of that rank in NVSHMEM."""
    for rank, network in enumerate(make()):
        library = libraries[rank]
        assert library.unique_id == b"one", "that of rank 0"
        assert library.calls.count("init") == 1
        region = ctypes.addressof(library.memory)
        assert network.region == region
        assert library.memory.raw == bytes(SIZES.num_bytes), "no flag is set"
        rail = Topology(rank, NODES).rail
        mapped = [region + (1 << 20) if other >= 2 and other != rank else 0 for other in rail]
        assert network.table.tolist() == [*mapped, *(10 + other for other in rail), 0]
        assert (network.name, network.library.version) == ("nvshmem", "NVSHMEM 3.4.5")


def test_a_process_initialises_it_once(libraries):
    for library in libraries:
        library.results["nvshmemx_init_status"] = 2
    assert all(network.region for network in make())
    assert not any("init" in library.calls for library in libraries)


@pytest.mark.parametrize(
    ("name", "result", "text"),
    [
        ("nvshmemx_get_uniqueid", 7, "rank 0: nvshmemx_get_uniqueid failed with status 7"),
        ("nvshmemx_hostlib_init_attr", 7, "rank 0: nvshmemx_hostlib_init_attr failed with status 7; each rank needs"),
        ("nvshmem_align", 0, "rank 0: nvshmem_align has no memory for 0.0 MiB; set NVSHMEM_SYMMETRIC_SIZE higher"),
        ("nvshmemx_init_status", 2, "NVSHMEM is initialised in some processes of the group, and not in others"),
    ],
)
def test_all_ranks_say_what_failed_on_one(libraries, name, result, text):
    libraries[0].results[name] = result
    for error in make():
        assert isinstance(error, NvshmemError)
        assert text in str(error)


def test_a_group_of_other_processes(libraries):
    libraries[2].num_processes = 8
    for error in make():
        assert "rank 2: NVSHMEM is initialised for 8 processes, and the group has 4 ranks" in str(error)


def test_a_rank_that_does_not_come(libraries, monkeypatch):
    """NVSHMEM has no deadline."""
    libraries[1].blocks.clear()
    in_time = nvshmem._in_time
    monkeypatch.setattr(
        nvshmem, "_in_time", lambda work, timeout_s: in_time(work, 0.1 if THREAD.rank == 1 else timeout_s)
    )
    for error in make():
        assert "rank 1: NVSHMEM did not connect the ranks within 0 s" in str(error)
    libraries[1].blocks.set()


def test_what_fails_after_the_last_exchange_is_said_by_all(libraries, monkeypatch):
    """Otherwise that rank would be one exchange ahead of the others."""

    def find() -> NvshmemDevice:
        if THREAD.rank == 2:
            raise OSError("no library of the device")
        return NvshmemDevice(Path("library.a"), "NVSHMEM 3.4.5")

    monkeypatch.setattr(NvshmemDevice, "find", find)
    for error in make():
        assert isinstance(error, NvshmemError)
        assert "rank 2: no library of the device" in str(error)


def test_a_module_that_nvshmem_refuses(libraries):
    THREAD.rank = 0
    device = NvshmemDevice(Path("library.a"), "NVSHMEM 3.4.5")
    device.enter(77)
    device.leave(77)
    assert libraries[0].calls == ["nvshmemx_cumodule_init", "nvshmemx_cumodule_finalize"]
    libraries[0].results["nvshmemx_cumodule_init"] = 3
    with pytest.raises(BackendUnavailable, match="NVSHMEM: nvshmemx_cumodule_init failed with status 3"):
        device.enter(77)


# ---------------------------------------------------------------------- what is missing


@pytest.fixture
def places(monkeypatch, tmp_path) -> Path:
    """The folder of the packages of NVIDIA, which is empty."""
    nvshmem.library.cache_clear()
    package = type("Package", (), {"submodule_search_locations": [str(tmp_path)]})()
    monkeypatch.setattr(nvshmem.importlib.util, "find_spec", lambda _: package)
    yield tmp_path
    nvshmem.library.cache_clear()


def test_without_the_libraries(places):
    assert "libnvshmem_host.so.3 and libnvshmem_device.a were not found" in nvshmem.why_not()
    assert "pip install 'nvidia-nvshmem-cu13==3.4.*'" in nvshmem.why_not()


def test_a_library_that_cannot_be_loaded(places):
    lib = places / "nvshmem" / "lib"
    lib.mkdir(parents=True)
    for name in ("libnvshmem_host.so.3", "libnvshmem_device.a"):
        (lib / name).write_text("not a library")
    assert "libnvshmem_host.so.3 cannot be loaded" in nvshmem.why_not()


class Versioned(Library):
    """A library of a later version."""

    def nvshmemx_vendor_get_version_info(self, *words: Any) -> None:
        for word, value in zip(words, (3, 8, 0), strict=True):
            word._obj.value = value


def test_another_version(places, monkeypatch):
    lib = places / "nvshmem" / "lib"
    lib.mkdir(parents=True)
    for name in ("libnvshmem_host.so.3", "libnvshmem_device.a"):
        (lib / name).touch()
    monkeypatch.setattr(nvshmem.ctypes, "CDLL", lambda *_, **__: WithTypes(Versioned(0)))
    assert "NVSHMEM 3.8.0 was found, and 3.4 is needed" in nvshmem.why_not()


class WithTypes:
    """A library whose functions may be given types."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        return lambda *args: getattr(self._library, name)(*args)
