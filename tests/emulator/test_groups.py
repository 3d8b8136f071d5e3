"""The contract suite's jobs on the CUDA backend, whose kernels the emulator runs: a thread a rank, no GPU.

What a launch would put on a stream is done when it returns: so this says nothing about streams and graphs.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import test_decode as decode
import test_throughput as throughput
import torch
from on_device import OnDevice

from emulator import Emulator, Jit, Kernel, Window
from tokenferry import MoeShape
from tokenferry.backends import cuda_setup, cuda_station
from tokenferry.backends.base import Resolved
from tokenferry.errors import CapacityError, ConfigError, MismatchError, RoutingError
from tokenferry.kernels.board import BOARD_BYTES
from tokenferry.memory.heap import Heap
from tokenferry.memory.streams import HostStreams
from tokenferry.testing.compare import same_bits
from tokenferry.words import Delivery, Layout, Quantized, Routing

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))

HEAP_BYTES = 64 << 20
TIMEOUT_S = 60.0


class DoneKernel(Kernel):
    """A kernel that has run when its launch returns."""

    def launch(self, params: Any, grid: int, block: int, smem_bytes: int, stream: int) -> None:
        copied = type(params).from_buffer_copy(params)
        self._go(copied, min(grid, 4), block, smem_bytes)


class DoneJit(Jit):
    """Kernels that run at once; shared by the ranks of this process."""

    _lock = threading.Lock()

    def kernel(self, spec: Any, **config: int) -> Kernel:
        key = (spec, *sorted(config.items()))
        with self._lock:
            if key not in self._kernels:
                self._kernels[key] = DoneKernel(spec, config, self._folder)
            return self._kernels[key]


class Place(Window):
    """A window of a rank, with what a station asks for."""

    def __init__(self, rank: int, bases: list[int], num_bytes: int) -> None:
        super().__init__(rank, bases, num_bytes)
        self.rank, self.num_ranks = rank, len(bases)

    def heap(self, first: int) -> Heap:
        return Heap(self.base, self.num_bytes - first, self.device, first)

    def close(self) -> None:
        """The memory stays; see the emulator."""


class Hall:
    """Where R threads meet to open groups; stands for the suite's `Pair` and its process group."""

    backend = "cuda"
    device = torch.device("cpu")

    def __init__(self, num_ranks: int, rank: int, shared: dict[str, Any]) -> None:
        self._num_ranks, self._rank, self._shared = num_ranks, rank, shared

    def open(self, pg: None, shape: MoeShape, **options: Any) -> OnDevice:
        shared, meet = self._shared, self._shared["barrier"].wait
        meet()
        if self._rank == 0:
            shared["windows"] = shared["emulator"].windows(self._num_ranks, BOARD_BYTES + HEAP_BYTES)
        meet()
        window = shared["windows"][self._rank]
        resolved = Resolved(shape, "cuda", "auto", TIMEOUT_S, False, HEAP_BYTES, "")
        place = Place(self._rank, window.bases, window.num_bytes)

        def exchange(card: dict[str, Any]) -> list[dict[str, Any]]:
            shared[f"card {self._rank}"] = card
            meet()
            cards = [shared[f"card {rank}"] for rank in range(self._num_ranks)]
            meet()
            return cards

        backend = cuda_setup.assemble(place, resolved, "emulated", "emulated", exchange)
        group = object.__new__(OnDevice)
        group._adopt(backend, shape, TIMEOUT_S)
        return group


@pytest.fixture
def run(monkeypatch, pytestconfig) -> Callable[..., None]:
    """``run(R, job, *args)``: call ``job(rank, None, hall, *args)`` in R threads."""
    folder = pytestconfig.cache.mkdir("emulator")
    jit = DoneJit(folder)
    properties = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(cuda_setup, "Jit", lambda index, cache: jit)
    monkeypatch.setattr(
        cuda_station,
        "Device",
        lambda index: SimpleNamespace(cuda=SimpleNamespace(cuStreamSynchronize=lambda stream: (0,))),
    )
    monkeypatch.setattr(cuda_station, "CudaStreams", lambda device: HostStreams())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def on_ranks(num_ranks: int, job: Callable[..., Any], *args: object) -> None:
        shared = {"barrier": threading.Barrier(num_ranks), "emulator": Emulator()}
        with ThreadPoolExecutor(num_ranks) as pool:
            halls = [Hall(num_ranks, rank, shared) for rank in range(num_ranks)]
            for waiting in [pool.submit(job, rank, None, hall, *args) for rank, hall in enumerate(halls)]:
                waiting.result()

    return on_ranks


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_round_trips(run, ranks):
    run(ranks, throughput.round_trips, ranks)


@pytest.mark.parametrize("ranks", [2])
def test_the_rest_of_the_throughput_calls(run, ranks):
    run(ranks, throughput.quantized_rows, ranks)
    run(ranks, throughput.overflow, ranks)
    run(3, throughput.plans_in_other_views)
    run(3, throughput.many_plans)


def test_decode_rounds(run):
    run(2, decode.rounds, 2)
    run(3, decode.counters, 3)


SHAPE = MoeShape(4, 2, 16, 8)


def one_errs(rank: int, pg: None, hall: Hall) -> None:
    """A bad index stops the rank that has it; the others wait for its next call."""
    with hall.open(pg, SHAPE) as group:
        x, good = torch.ones(3, 16), torch.tensor([[0, 3], [1, 2], [2, -1]])
        if rank == 1:
            bad = good.clone()
            bad[2, 1] = 4
            with pytest.raises(RoutingError, match=r"topk_idx\[2, 1\] is 4"):
                group.dispatch(x, Routing(bad))
            group.dispatch(x, Routing(bad), delivery=Delivery(counts="device"))
            with pytest.raises(RoutingError, match=r"topk_idx\[2, 1\] is 4"):
                group.synchronize()
        sent = group.dispatch(x, Routing(good))
        assert group.combine(sent.x, sent.plan).x[:, 0].tolist() == [2.0, 2.0, 1.0]


def test_bad_routing(run):
    run(2, one_errs)


def other_call(group: OnDevice, sent: Any, rank: int) -> None:
    if rank:
        group.combine(sent.x, sent.plan)
    else:
        group.redispatch(torch.ones(2, 16), sent.plan)
    group.synchronize()


def other_calls(rank: int, pg: None, hall: Hall) -> None:
    with hall.open(pg, SHAPE) as group:
        sent = group.dispatch(torch.ones(2, 16), Routing(torch.tensor([[0, 3], [1, 2]])))
        with pytest.raises(MismatchError, match="different calls"):
            other_call(group, sent, rank)
        assert group._backend.broken


def test_other_calls(run):
    run(2, other_calls)


def odd_views(rank: int, pg: None, hall: Hall) -> None:
    """What a view has no room for is told before a kernel runs; the group stays usable."""
    with hall.open(pg, SHAPE) as group:
        x, routing = torch.ones(2, 16), Routing(torch.tensor([[0, 3], [1, -1]]))
        for shape, what in ((MoeShape(8192, 2, 16, 8), "num_experts=8192"), (MoeShape(4, 65, 16, 8), "top_k=65")):
            wide = Routing(torch.full((2, shape.top_k), -1))
            with pytest.raises(ConfigError, match=what):
                group.for_shape(shape).dispatch(x, wide)
        with pytest.raises(CapacityError, match="a place can say"):
            group.for_shape(MoeShape(4, 2, 16, 1 << 28)).dispatch(x, routing, delivery=Delivery(Layout.MASKED))
        scale = torch.arange(12, dtype=torch.float64).reshape(3, 2, 2).to(torch.complex128)[:, :, 0].T  # strided
        sent = group.dispatch(Quantized(x, scale), routing)
        same_bits("wide scales", torch.view_as_real(sent.x.scale[:1]), torch.view_as_real(scale.contiguous()[:1]))


def test_odd_views_and_wide_scales(run):
    run(2, odd_views)
