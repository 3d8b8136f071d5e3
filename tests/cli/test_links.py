"""Launches of the kernels of `tokenferry limits`, on memory of this process, with a stand-in for the GPU."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from support.bench_jobs import discard
from tokenferry.bench.core import device, session
from tokenferry.bench.suites import links
from tokenferry.bench.suites.links import CudaLinks, check_stored
from tokenferry.errors import PeerTimeout
from tokenferry.kernels.link_limits import spec

ROWS, ROW_BYTES = 11, 48
SMEM_BYTES = 227 * 1024
"""Shared memory of a block on Hopper."""


class Machine:
    """Windows in ordinary memory, and the kernels of kernels/link_limits/kernel.cuh in plain loops."""

    def __init__(self, monkeypatch, num_ranks):
        self.windows = [torch.zeros(links.ROWS_OFFSET + (1 << 20), dtype=torch.uint8) for _ in range(num_ranks)]
        self.launches, self.late = [], 0
        stream = SimpleNamespace(cuda_stream=77)
        monkeypatch.setattr(links, "share", self.share)
        monkeypatch.setattr(links, "Bootstrap", lambda pg, timeout_s, device: "table")
        monkeypatch.setattr(links, "Jit", lambda index, folder, arch: self)
        monkeypatch.setattr(
            links, "Device", lambda index: SimpleNamespace(smem_bytes=lambda: SMEM_BYTES, close=lambda: None)
        )
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
        sms = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: sms)

    def share(self, table, rank, ranks, device, num_bytes, zero_bytes):
        assert ranks == range(len(self.windows))
        assert (table is None) == (len(ranks) == 1)
        assert zero_bytes == links.ROWS_OFFSET < num_bytes
        bases = tuple(window.data_ptr() for window in self.windows)
        return SimpleNamespace(bases=bases, base=bases[rank], close=lambda: None)

    def warmup(self, specs):
        assert specs == spec.SPECS

    def close(self):
        pass

    def kernel(self, which, **config):
        assert config in which.configs

        def launch(params, grid, block, smem_bytes, stream):
            assert stream == 77
            self.launches.append((which.name, grid, block, smem_bytes))
            getattr(self, which.name)(params)

        return SimpleNamespace(launch=launch)

    def _rows(self, p):
        others = max(p.num_ranks - 1, 1)
        for t in range(p.num_rows):
            peer = (p.rank + 1 + t % others) % p.num_ranks
            place = p.windows[peer] + p.rows_offset + (p.rank * p.rows_per_rank + t // others) * p.row_bytes
            yield p.local + t * p.row_bytes, place

    def link_limits_store(self, p):
        for mine, place in self._rows(p):
            ctypes.memmove(place, mine, p.row_bytes)

    def link_limits_load(self, p):
        for mine, place in self._rows(p):
            ctypes.memmove(mine, place, p.row_bytes)

    def link_limits_copy(self, p):
        ctypes.memmove(p.target, p.local, p.num_rows * p.row_bytes)

    def link_limits_barrier(self, p):
        self.epochs = getattr(self, "epochs", [])
        self.epochs.append((p.epoch, p.iterations))
        ctypes.memmove(p.failed, (ctypes.c_uint32 * 1)(self.late), 4)

    link_limits_flag = link_limits_barrier


def rank_of(rank, num_ranks):
    return SimpleNamespace(rank=lambda: rank, size=lambda: num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_rows_of_every_rank_are_found_where_they_were_stored(monkeypatch, num_ranks):
    machine = Machine(monkeypatch, num_ranks)
    ranks = [CudaLinks(rank_of(r, num_ranks), torch.device("cpu"), 1 << 12, 1.0) for r in range(num_ranks)]
    rows = [torch.randint(0, 256, (ROWS, ROW_BYTES), dtype=torch.uint8) for _ in ranks]
    for one, mine in zip(ranks, rows, strict=True):
        one.shape(ROWS, ROW_BYTES)
        one.store(mine, 24)
    for rank, one in enumerate(ranks):
        for source in range(num_ranks):
            if source != rank or num_ranks == 1:
                check_stored(one.places(), rank, source, rows[source])
        back, copy = torch.zeros_like(rows[rank]), torch.zeros_like(rows[rank])
        one.load(back, 24)
        assert torch.equal(back, rows[rank])
        one.copy(copy, rows[rank], 24)
        assert torch.equal(copy, rows[rank])
    assert machine.launches[0] == ("link_limits_store", 24, 512, 16 * 3 * ROW_BYTES)


@pytest.mark.parametrize(("row_bytes", "warps"), [(7168, 10), (14336, 5)])
def test_a_block_has_an_sm_for_itself(monkeypatch, row_bytes, warps):
    machine = Machine(monkeypatch, 1)
    one = CudaLinks(rank_of(0, 1), torch.device("cpu"), 0, 1.0)
    one.shape(0, row_bytes)
    one.store(torch.zeros(1, dtype=torch.uint8), 8)
    [(_, grid, block, smem)] = machine.launches
    assert (grid, block, smem) == (8, warps * 32, warps * 3 * row_bytes)
    assert SMEM_BYTES // 2 < smem <= SMEM_BYTES - spec.STORE.static_smem


def test_iterations_only_grow(monkeypatch):
    machine = Machine(monkeypatch, 2)
    with CudaLinks(rank_of(1, 2), torch.device("cpu"), 0, 1.0) as one:
        one.barrier()
        one.barrier(5)
        one.flag(7)
        one.barrier()
        one.flag(1)
        one.check()
    assert machine.epochs == [(1, 1), (2, 5), (1, 7), (7, 1), (8, 1)]


def test_a_wait_that_ran_out_names_the_peer(monkeypatch):
    machine = Machine(monkeypatch, 3)
    one = CudaLinks(rank_of(1, 3), torch.device("cpu"), 0, 0.25)
    machine.late = 1 + 2
    one.barrier()
    with pytest.raises(PeerTimeout, match=r"rank 1 waited 0\.25 s in a kernel for rank 2") as caught:
        one.check()
    assert caught.value.peers == (2,)


class FakeEvent:
    """An event of a stand-in for torch.cuda."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.now += 1.0
        self.at = FakeEvent.now

    def elapsed_time(self, end):
        return end.at - self.at

    def query(self):
        return FakeEvent.now > self.at


def test_the_clock_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 10))
    sms = SimpleNamespace(multi_processor_count=78)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: sms)
    gpu = device.device_for("cuda")
    start, end = gpu.stamp(), gpu.stamp()
    gpu.synchronize()
    # The events of CudaDevice are torch's; the stand-in's class is in its place.
    assert gpu.seconds(start, end) == pytest.approx(1e-3), "milliseconds become seconds"
    assert (gpu.passed(start), gpu.passed(end)) == (True, False)
    assert gpu.used_bytes() == 7
    assert gpu.num_sms == 78


def test_a_gpu_is_held_for_as_long_as_asked(monkeypatch):
    slept = []

    def sleep(cycles):
        slept.append(cycles)
        FakeEvent.now += cycles / 2e9 * 1e3 - 1  # milliseconds at 2 GHz; recording the end is the other one

    sms = SimpleNamespace(multi_processor_count=78)
    for name, stand_in in (
        ("Event", FakeEvent),
        ("current_device", lambda: 0),
        ("synchronize", lambda device: None),
        ("get_device_properties", lambda device: sms),
        ("_sleep", sleep),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    gpu = device.device_for("cuda")
    gpu.hold(300e-6)
    gpu.hold(10e-6)
    assert slept[-2:] == [pytest.approx(600_000, abs=1), pytest.approx(20_000, abs=1)]
    assert len(slept) == 4, "its clock is measured once"


def test_a_session_on_gpus_starts_behind_a_barrier_of_the_devices(monkeypatch):
    events = []

    class Link:
        def __init__(self, pg, device, row_bytes, timeout_s, cache):
            assert row_bytes == 0
            assert str(cache)

        def barrier(self):
            events.append("device")

        def __enter__(self):
            return self

        def __exit__(self, *args):
            events.append("closed")

    monkeypatch.setattr(links, "CudaLinks", Link)
    monkeypatch.setattr(device.CpuDevice, "hold", lambda self, seconds: events.append(f"held {seconds}"))
    monkeypatch.setattr(session, "device_for", lambda backend: device.CpuDevice())
    monkeypatch.setattr(session.dist, "barrier", lambda pg: events.append("host"))
    settings = session.Settings(2, (4,), 128, 2, 8, 2, 1, 0)

    def measure(opened):
        opened.synchronize_ranks()
        opened.synchronize_ranks(0.5)

    session.in_session(0, rank_of(0, 2), discard, settings, measure)
    # Held before the barrier: a device that is held longer than others must not start later.
    assert events == ["host", "device", "host", "held 0.5", "device", "host", "closed"]
