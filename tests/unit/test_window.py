"""Windows over a fake driver that records calls: what is mapped and freed when, and one result on all ranks."""

import contextlib
import ctypes
import enum
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tokenferry.errors import BackendUnavailable
from tokenferry.memory import reach, window
from tokenferry.memory.streams import HostStreams

MIB = 1 << 20


class Code(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED = 704
    CUDA_ERROR_NOT_SUPPORTED = 801


class Handle:
    def __init__(self):
        self._bytes = (ctypes.c_char * 64)()

    def getPtr(self):  # noqa: N802 - the driver's name
        return ctypes.addressof(self._bytes)


class Cuda:
    """The driver of one machine: allocations by address, mappings, and a log of calls."""

    CUresult = Code
    CUipcMemHandle = Handle
    CUstreamCaptureMode = enum.IntEnum("Mode", "CU_STREAM_CAPTURE_MODE_GLOBAL CU_STREAM_CAPTURE_MODE_RELAXED")
    CUipcMem_flags = enum.IntEnum("Flags", "CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS")

    def __init__(self):
        self.lock = threading.Lock()
        self.allocated = {}
        self.mapped = {}
        self.zeroed = {}
        self.log = []
        self.free_bytes = 1 << 40
        self.refuse_handles_of = set()
        self.next = 0x10000000

    def cuMemAlloc(self, num_bytes):  # noqa: N802
        with self.lock:
            if num_bytes > self.free_bytes:
                return Code.CUDA_ERROR_OUT_OF_MEMORY, None
            self.next += 1 << 32
            self.allocated[self.next] = num_bytes
            return Code.CUDA_SUCCESS, self.next

    def cuMemGetInfo(self):  # noqa: N802
        return Code.CUDA_SUCCESS, self.free_bytes, 1 << 40

    def cuMemsetD8(self, address, value, num_bytes):  # noqa: N802
        assert value == 0
        self.zeroed[address] = num_bytes
        return (Code.CUDA_SUCCESS,)

    def cuStreamSynchronize(self, stream):  # noqa: N802
        return (Code.CUDA_SUCCESS,)

    def cuMemFree(self, address):  # noqa: N802
        del self.allocated[address]
        return (Code.CUDA_SUCCESS,)

    def cuThreadExchangeStreamCaptureMode(self, mode):  # noqa: N802
        return Code.CUDA_SUCCESS, mode

    def cuIpcGetMemHandle(self, address):  # noqa: N802
        if address in self.refuse_handles_of:
            return Code.CUDA_ERROR_NOT_SUPPORTED, None
        handle = Handle()
        ctypes.memmove(handle.getPtr(), address.to_bytes(8, "little"), 8)
        return Code.CUDA_SUCCESS, handle

    def cuIpcOpenMemHandle(self, handle, flags):  # noqa: N802
        address = int.from_bytes(ctypes.string_at(handle.getPtr(), 8), "little")
        if address in self.refuse_handles_of:
            return Code.CUDA_ERROR_NOT_SUPPORTED, None
        with self.lock:
            self.next += 1 << 32
            self.mapped[self.next] = address
            return Code.CUDA_SUCCESS, self.next

    def cuCtxSynchronize(self):  # noqa: N802
        self.log.append("synchronize")
        return (Code.CUDA_SUCCESS,)

    def cuIpcCloseMemHandle(self, address):  # noqa: N802
        self.log.append("unmap")
        del self.mapped[address]
        return (Code.CUDA_SUCCESS,)

    def cuCtxEnablePeerAccess(self, context, flags):  # noqa: N802
        self.log.append(("peer", context))
        return (Code.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED,)


class Device:
    inherited = False

    def __init__(self, cuda, index):
        self.cuda = cuda
        self.index = index
        self._context = f"context {index}"

    @contextlib.contextmanager
    def current(self):
        yield


class Table:
    """Handshakes between threads."""

    def __init__(self, shared, barrier, rank):
        self.shared, self.barrier, self.rank = shared, barrier, rank

    def exchange(self, handshake):
        self.shared[self.rank] = handshake
        self.barrier.wait(10)
        handshakes = list(self.shared)
        self.barrier.wait(10)
        return handshakes


def describe(device, **changed):
    properties = {"name": "H", "index": device.index, "uuid": f"GPU-{device.index}", "capability": [9, 0]}
    process = f"process {device.index}"
    return {"host": "here", "process": process, "device": {**properties, **changed}, "trouble": ""}


@pytest.fixture
def cuda(monkeypatch):
    driver = Cuda()
    monkeypatch.setattr(window, "Device", lambda index: Device(driver, index))
    monkeypatch.setattr(window, "CudaStreams", lambda device: HostStreams())
    monkeypatch.setattr(window, "describe", describe)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return driver


def share_all(num_ranks, num_bytes=3 * MIB, zero_bytes=None):
    """Every rank in a thread; returns windows, or what was raised."""
    shared, barrier = [None] * num_ranks, threading.Barrier(num_ranks)

    def rank(number):
        table = Table(shared, barrier, number)
        try:
            return window.share(table, number, range(num_ranks), torch.device("cuda", number), num_bytes, zero_bytes)
        except BackendUnavailable as error:
            return str(error)

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(rank, range(num_ranks)))


def test_every_rank_addresses_every_window(cuda):
    windows = share_all(3, zero_bytes=1000)
    for rank, mine in enumerate(windows):
        assert (mine.rank, mine.num_ranks, mine.num_bytes, mine.device.index) == (rank, 3, 3 * MIB, rank)
        assert mine.base == mine.bases[rank]
        assert [cuda.mapped.get(base, base) for base in mine.bases] == [other.base for other in windows]
        assert cuda.allocated[mine.base] == 4 * MIB, "what is smaller than 2 MiB would share its page"
        assert cuda.zeroed[mine.base] == 1000
    for mine in windows:
        mine.close()
        mine.close()
    assert (cuda.mapped, cuda.allocated) == ({}, {})
    assert cuda.log == ["synchronize", "unmap", "unmap"] * 3, "work that is queued may use what is unmapped"


def test_nothing_is_unmapped_that_could_not_be_waited_for(cuda, monkeypatch):
    """Such as during a capture in another thread: work that is queued may use it."""
    mine, other = share_all(2)
    monkeypatch.setattr(cuda, "cuCtxSynchronize", lambda: (Code.CUDA_ERROR_NOT_SUPPORTED,))
    mine.close()
    assert (len(cuda.mapped), cuda.log) == (2, [])
    monkeypatch.undo()
    other.close()


def test_a_window_is_freed_when_it_is_closed_and_its_last_block_is_gone(cuda):
    (mine,) = share_all(1)
    heap = mine.heap(MIB)
    block = heap.block(1000, 0)
    assert (block.offset, heap.num_bytes) == (3 * MIB - 1024, 2 * MIB)
    assert block.address == mine.base + block.offset
    mine.close()
    assert cuda.allocated
    del block
    assert not cuda.allocated


def test_a_group_of_one_needs_no_table_and_no_handle(cuda):
    cuda.refuse_handles_of = set(range(0x10000000, 0x10000000 + (10 << 32), 1 << 32))
    mine = window.share(None, 0, range(1), torch.device("cuda", 0), MIB)
    assert mine.bases == (mine.base,)
    assert cuda.zeroed[mine.base] == MIB


def test_ranks_of_one_process_use_addresses_as_they_are(cuda, monkeypatch):
    monkeypatch.setattr(window, "describe", lambda device: {**describe(device), "process": "one"})
    windows = share_all(2)
    assert windows[0].bases == windows[1].bases
    assert cuda.mapped == {}
    assert sorted(cuda.log) == [("peer", "context 0"), ("peer", "context 1")]


def test_virtual_ranks_keep_the_memory_of_all(cuda):
    windows = window.share_in_process(3, torch.device("cuda", 0), MIB)
    assert [w.base for w in windows] == list(windows[0].bases)
    assert len(set(windows[0].bases)) == 3
    windows[0].close()
    windows[1].close()
    assert len(cuda.allocated) == 3
    windows[2].close()
    assert not cuda.allocated


def test_too_little_memory_on_one_rank_is_an_error_on_all(cuda):
    cuda.free_bytes = 6 * MIB
    original = cuda.cuMemAlloc

    def alloc(num_bytes):
        result = original(num_bytes)
        cuda.free_bytes = 2 * MIB
        return result

    cuda.cuMemAlloc = alloc
    first, second = share_all(2)
    assert first == second
    assert "3 MiB for the window are not available, 2 of 1048576 MiB are free" in first
    assert "set TOKENFERRY_HEAP_MB lower" in first
    gc.collect()
    assert cuda.allocated == {}


def test_a_mapping_that_fails_on_one_rank_is_an_error_on_all(cuda):
    original = cuda.cuIpcOpenMemHandle
    calls = []

    def refuse_third(handle, flags):
        calls.append(1)
        return (Code.CUDA_ERROR_NOT_SUPPORTED, None) if len(calls) == 3 else original(handle, flags)

    cuda.cuIpcOpenMemHandle = refuse_third
    texts = share_all(3)
    assert len(set(texts)) == 1
    assert "cannot map the memory of rank" in texts[0]
    assert "CUDA_ERROR_NOT_SUPPORTED (801); containers need a common PID and IPC namespace" in texts[0]
    gc.collect()
    assert (cuda.mapped, cuda.allocated) == ({}, {})


def test_handles_that_are_not_to_be_had_are_an_error_on_all(cuda):
    cuda.refuse_handles_of = {0x10000000 + (1 << 32)}
    first, second = share_all(2)
    assert first == second
    assert "making an IPC handle of the window failed: CUDA_ERROR_NOT_SUPPORTED" in first


def test_all_ranks_get_the_same_reason(cuda, monkeypatch):
    monkeypatch.setattr(
        window, "describe", lambda device: describe(device, capability=[7, 5] if device.index == 2 else [9, 0])
    )
    texts = share_all(3)
    assert set(texts) == {
        "ranks cannot share GPU memory: rank 2 has a GPU of compute capability 7.5 (H), "
        "and 8.0 (Ampere) or newer is needed"
    }
    assert not cuda.allocated


def handshakes(*changes):
    return [{**describe(torch.device("cuda", rank)), **change} for rank, change in enumerate(changes)]


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (handshakes({}, {}), ""),
        (handshakes(*[{}] * 9), "9 ranks are more than the 8 that can share memory"),
        (handshakes({}, {"host": "there"}), "the ranks are on 2 hosts"),
        (handshakes({}, {"device": None}), "rank 1 has no CUDA device"),
        (
            handshakes({}, {"device": None, "trouble": " that works: sick"}),
            "rank 1 has no CUDA device that works: sick",
        ),
    ],
    ids=["fine", "nine", "hosts", "none", "trouble"],
)
def test_reasons_in_handshakes(monkeypatch, case, text):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert reach.why_not(case, 0) == text


def test_reasons_are_those_of_one_node(monkeypatch):
    """Ranks of other nodes may be on other hosts, and have troubles of their own."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    case = handshakes({}, {}, {"host": "there"}, {"host": "there", "device": None})
    assert reach.why_not(case, 0, (0, 1)) == ""
    assert reach.why_not(case, 2, (2, 3)) == "rank 3 has no CUDA device"
    assert reach.why_not(case, 1, (1, 2)) == "the ranks are on 2 hosts"


def test_a_handshake_describes_the_gpu_or_its_trouble(monkeypatch):
    class Properties:
        name, uuid, major, minor = "H", "GPU-5", 9, 0

        def __init__(self, device):
            if device.index == 7:
                raise AssertionError("Invalid device id")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    expected = {"name": "H", "index": 5, "uuid": "GPU-5", "capability": [9, 0]}
    assert reach.describe(torch.device("cuda", 5))["device"] == expected
    sick = reach.describe(torch.device("cuda", 7))
    assert (sick["device"], sick["trouble"]) == (None, " that works: Invalid device id")
    assert reach.describe(torch.device("cpu"))["device"] is None


def test_gpus_that_cannot_reach_each_other_are_named(monkeypatch):
    class Properties:
        def __init__(self, index):
            self.uuid = f"GPU-{index}"

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: device != 1)
    case = handshakes({}, {}, {})
    assert reach.why_not(case, 0) == "", "the GPU of rank 2 is not visible here and cannot be asked about"
    assert reach.why_not(case, 1) == "the GPU of rank 1 (GPU-1) cannot reach that of rank 0 (GPU-0)"


def without_gpu(rank, pg):
    from tokenferry.transports.handshake import Bootstrap as Handshakes

    table = Handshakes(pg, 10.0)
    return reach.why_not(table.exchange(reach.describe(torch.device("cuda", rank) if rank else None)), rank)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_machines_without_a_gpu_say_so(worlds):
    assert worlds(2).run(without_gpu) == ["rank 0 has no CUDA device"] * 2
