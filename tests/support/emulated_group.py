"""Groups on the CUDA backend whose ranks are threads and whose kernels the emulator runs, without a GPU.

A launch returns when its kernel has ended, so these groups test neither streams nor CUDA graphs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch

from support.emulated_rails import Boxes, QueueRails
from support.emulator import ARCH, Emulator, Jit, Kernel, Window
from support.fake_network import CALM, FakeNetwork, Report, Weather
from support.kernel_promises import SMEM_BYTES
from support.on_device import OnDevice
from support.worlds import run_at_once
from tokenferry import MoeShape, env
from tokenferry.backends.base import Resolved
from tokenferry.backends.cuda.across.backend import InternodeLinks
from tokenferry.backends.cuda.across.puts import region_sizes
from tokenferry.backends.cuda.runtime import Runtime
from tokenferry.backends.cuda.setup import assemble, assemble_across
from tokenferry.kernels.control_block import CONTROL_BLOCK_BYTES
from tokenferry.memory.heap import Heap
from tokenferry.memory.streams import HostStreams
from tokenferry.topology import Topology, consecutive

HEAP_BYTES = 64 << 20
TIMEOUT_S = 60.0
PROCESS_S = 200.0
"""Seconds for jobs that share the processors."""

_Key = TypeVar("_Key")
_Result = TypeVar("_Result")


class SynchronousKernel(Kernel):
    """A kernel that has ended when its launch returns."""

    def launch(self, params: Any, grid: int, block: int, smem_bytes: int, stream: int) -> None:
        copied = type(params).from_buffer_copy(params)
        self._go(copied, min(grid, 4), block, smem_bytes)


class SynchronousJit(Jit):
    """The kernels of all ranks of this process."""

    kernel_type: type[Kernel] = SynchronousKernel
    _lock = threading.Lock()

    def kernel(self, spec: Any, **config: int) -> Kernel:
        key = (spec, *sorted(config.items()))
        with self._lock:
            if key not in self._kernels:
                self._kernels[key] = self.kernel_type(spec, config, self._folder, self._arch)
            return self._kernels[key]


class EmulatedWindow(Window):
    """The window of a rank, with what the context of a group needs."""

    def __init__(self, rank: int, bases: list[int], num_bytes: int) -> None:
        super().__init__(rank, bases, num_bytes)
        self.rank, self.num_ranks = rank, len(bases)

    def heap(self, first: int) -> Heap:
        return Heap(self.base, self.num_bytes - first, self.device, first)

    def close(self) -> None:
        """Do nothing: the emulator keeps the memory."""


class Threads:
    """The threads of a job, with the methods of a process group that jobs use."""

    def __init__(self, num_ranks: int, runtime: Runtime) -> None:
        self._barrier = threading.Barrier(num_ranks)
        self.num_ranks = num_ranks
        self.runtime = runtime
        self.emulator = Emulator()
        self.windows: list[list[Window]] = []
        """Of each node."""
        self.boxes = Boxes()
        self.network: FakeNetwork | None = None

    def size(self) -> int:
        return self.num_ranks

    def barrier(self) -> SimpleNamespace:
        return SimpleNamespace(wait=self.wait)

    def wait(self) -> None:
        self._barrier.wait(TIMEOUT_S)

    def close(self) -> None:
        """End the network of the group before."""
        if self.network is not None:
            self.network.close()

    def abort(self) -> None:
        """End the waits of all threads after a rank has failed."""
        self._barrier.abort()


@dataclass(frozen=True)
class Puts:
    """Decode calls across nodes put into memory of other ranks.

    Attributes:
        weather: What the network does to what is put.
        mapped: Returns whether a rank's memory is mapped on its rail peers.
        shape: The largest shape of views; None: the group's.
    """

    weather: Weather = CALM
    mapped: Callable[[int], bool] = lambda _: False
    shape: MoeShape | None = None


class EmulatedPair:
    """Opens groups of threads; stands for the contract suite's `Pair`."""

    backend = "cuda"
    transport = "nvlink"
    device = torch.device("cpu")

    def __init__(
        self, rank: int, threads: Threads, ranks_per_node: int | None = None, puts: Puts | None = None
    ) -> None:
        self._rank, self._threads, self._puts = rank, threads, puts
        nodes = consecutive(threads.num_ranks, ranks_per_node or threads.num_ranks)
        self._topology = Topology(rank, nodes)
        if self._topology.num_nodes > 1:
            self.transport = "nvlink+queues" if self._topology.ranks_per_node > 1 else "queues"
            self.transport += "+fake" if puts else ""

    def barrier(self) -> None:
        """Wait until all threads are here."""
        self._threads.wait()

    @property
    def report(self) -> Report:
        """What the network has done; nothing without one."""
        return Report() if self._threads.network is None else self._threads.network.report

    def open(
        self,
        pg: Any,
        shape: MoeShape,
        *,
        timeout_s: float = TIMEOUT_S,
        on_timeout: str = "raise",
        put_bytes: int | None = None,
        **options: Any,
    ) -> OnDevice:
        threads, rank = self._threads, self._rank
        threads.wait()
        if rank == 0:
            num_bytes = CONTROL_BLOCK_BYTES + HEAP_BYTES
            threads.windows = [threads.emulator.windows(len(ranks), num_bytes) for ranks in self._topology.nodes]
            threads.boxes = Boxes()
            threads.close()
            if self._puts is not None:
                sizes = region_sizes(self._puts.shape or shape, self._topology, put_bytes)
                threads.network = FakeNetwork(threads.num_ranks, sizes, self.device, self._puts.weather)
        threads.wait()
        at = self._topology
        window = threads.windows[at.node][at.local_rank]
        resolved = Resolved(
            shape, "cuda", "auto", timeout_s, on_timeout == "mask", HEAP_BYTES, "", fast_path=env.read().fast_path
        )
        emulated = EmulatedWindow(at.local_rank, window.bases, window.num_bytes)
        if at.num_nodes > 1:
            links = InternodeLinks(QueueRails(at, threads.boxes, timeout_s))
            if threads.network is not None and self._puts is not None:
                links = replace(links, network=threads.network.network(at, self._puts.mapped))
            backend = assemble_across(emulated, resolved, "emulated", at, links, threads.runtime)
        else:
            backend = assemble(emulated, resolved, "emulated", "emulated", threads.runtime)
        group = object.__new__(OnDevice)
        group._adopt(backend, shape, timeout_s)
        return group


def run_jobs(
    runtime: Runtime,
    num_ranks: int,
    job: Callable[..., Any],
    *args: object,
    ranks_per_node: int | None = None,
    puts: Puts | None = None,
) -> list[Any]:
    """Call ``job(rank, threads, pair, *args)`` in R threads; return their results by rank, or raise the first error."""
    threads = Threads(num_ranks, runtime)

    def work(rank: int) -> Any:
        try:
            return job(rank, threads, EmulatedPair(rank, threads, ranks_per_node, puts), *args)
        except BaseException:
            threads.abort()
            raise

    with ThreadPoolExecutor(num_ranks) as pool:
        jobs = [pool.submit(work, rank) for rank in range(num_ranks)]
    threads.close()
    errors = [job.exception() for job in jobs if job.exception()]
    for error in sorted(errors, key=lambda one: isinstance(one, threading.BrokenBarrierError)):
        raise error
    return [job.result() for job in jobs]


def in_each(
    run: Callable[..., list[Any]], first: Callable[..., None], job: Callable[..., _Result], of: Iterable[_Key]
) -> dict[_Key, list[_Result]]:
    """Run a job of four ranks on two nodes for each call, or the like, that it gets; all wait at the same time.

    ``first`` is run alone, and makes each call once: no kernel shall be built while ranks have a short deadline.
    """
    run(4, first, ranks_per_node=2)
    keys = list(of)
    with ThreadPoolExecutor(len(keys)) as pool:
        return dict(zip(keys, pool.map(lambda key: run(4, job, key, ranks_per_node=2), keys), strict=True))


def emulate(
    config: pytest.Config, jit_type: type[SynchronousJit] = SynchronousJit, arch: str = ARCH
) -> Callable[..., list[Any]]:
    """Return `run_jobs` on the emulator of a GPU of an architecture. Compiled kernels stay for the next session."""
    return _emulate(config.cache.mkdir("emulator"), jit_type, arch)


def in_processes(
    config: pytest.Config, first: Callable[..., object], jobs: Mapping[_Key, Callable[..., _Result]]
) -> dict[_Key, Future[list[_Result]]]:
    """Call each ``job(run=run)`` in a process of its own, with what `emulate` returns; all wait at the same time.

    In one process their threads would hold up one another. Jobs are pickled: `functools.partial` of functions of
    modules, such as `on_ranks`. ``first`` is called alone, and makes each call once: no kernel shall be built while
    ranks have a short deadline.

    Returns:
        dict: by key, a list of one result, or the WorldError of the job.
    """
    first(run=emulate(config))
    folder = config.cache.mkdir("emulator")
    each = {key: partial(_in_process, folder=folder, job=job) for key, job in jobs.items()}
    return run_at_once(1, "cpu", each, timeout_s=PROCESS_S)


def on_ranks(num_ranks: int, job: Callable[..., Any], *args: object, run: Callable[..., list[Any]]) -> list[Any]:
    """``run(num_ranks, job, *args)``, for `in_processes`."""
    return run(num_ranks, job, *args)


def _in_process(rank: int, pg: Any, folder: Path, job: Callable[..., _Result]) -> _Result:
    return job(run=_emulate(folder, SynchronousJit, ARCH))


def _emulate(folder: Path, jit_type: type[SynchronousJit], arch: str) -> Callable[..., list[Any]]:
    driver: Any = SimpleNamespace(cuda=SimpleNamespace(cuStreamSynchronize=lambda stream: (0,)), current=nullcontext)
    jit: Any = jit_type(folder, arch)
    return partial(run_jobs, Runtime(jit, driver, HostStreams(), num_sms=4, smem_bytes=SMEM_BYTES[arch]))
