"""Iterations of decode calls on all ranks: the waits of ranks for one another, and the time stamps of kernels.

Jobs of `World`. `tokenferry.bench.profile.timeline` and `tokenferry.bench.profile.diagnose` put their results together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.bench.core.checks import as_tensor, must_be_near
from tokenferry.bench.core.device import Device, device_for
from tokenferry.bench.core.inputs import Sizes, draw
from tokenferry.errors import ConfigError, page_place
from tokenferry.types import BackendName, DecodeCombined, DecodeDispatched, DecodeStats, Quantized, Scale

CALIBRATIONS = 64
"""Calls from which the clocks of ranks are aligned; each rank is late in every R-th."""
CALIBRATION_LATE_S = 30e-6
CHAIN = 16
"""Iterations back to back, of which the last is recorded."""

Barrier = Callable[[], object]
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Waited:
    """The waits of one rank.

    Attributes:
        dispatch_ns: ``[R]`` int64: the time it waited for messages of each rank in the dispatches of all iterations.
        combine_ns: The same for the combines.
        took_ns: The time of all iterations.
        words: ``[iterations, blocks, TRACE_WORDS]`` of the dispatches; None where kernels record nothing.
    """

    dispatch_ns: Tensor
    combine_ns: Tensor
    took_ns: float
    words: Tensor | None


@dataclass(frozen=True, slots=True)
class Slowed:
    """A rank that is late on purpose.

    Attributes:
        rank: The rank; -1: none.
        busy_s: Seconds for which it is busy before each iteration.
    """

    rank: int = -1
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CountSettings:
    """Settings of `count_waits`.

    Attributes:
        sizes: Sizes of the group and the inputs.
        iterations: Iterations that count.
        backend: ``"cpu"`` or ``"cuda"``.
        slowed: A rank that is late on purpose.
    """

    sizes: Sizes
    iterations: int
    backend: BackendName = "cpu"
    slowed: Slowed = Slowed()


def count_waits(rank: int, pg: dist.ProcessGroup, settings: CountSettings) -> Waited:
    """Run iterations of dispatch and combine; see `count_in`. A job of `World`.

    Raises:
        WrongAnswer: rows came home wrong; nothing was counted.
        ConfigError: the ranks are several nodes.
    """
    with ExpertGroup(pg, settings.sizes.shape, backend=settings.backend) as group, torch.no_grad():
        need_one_node(group)
        return count_in(group, device_for(settings.backend), lambda: dist.barrier(pg), settings)


def need_one_node(group: ExpertGroup) -> None:
    """Check that all ranks wait for one another directly, as verdicts and clocks have it.

    Raises:
        ConfigError: they are several nodes.
    """
    topology = group.topology
    if topology.num_nodes > 1:
        raise ConfigError(
            f"diagnose and trace need ranks of one node, and these are {topology} ({topology.found}): across nodes a "
            "rank waits for what others pass on, and its clock is compared with those of its node only; see "
            f"{page_place('diagnosing')}"
        )


def count_in(group: ExpertGroup, device: Device, barrier: Barrier, settings: CountSettings) -> Waited:
    """Count in an open group; on GPUs the iterations are one CUDA graph, so that hosts have no part in it.

    All iterations run twice, back to back; those of the second time are counted.

    Args:
        group: A group for ``settings.sizes``.
        device: Device of the group.
        barrier: Returns when all ranks have called it.
        settings: What is run; its backend is not used.
    """
    step = DecodeStep(group, settings.sizes)
    step.check()
    waits = torch.zeros(2, group.num_ranks, dtype=torch.int64, device=group.device)
    stats = [DecodeStats(wait_ns=one) for one in waits]
    recorder = Recorder(group, settings.iterations)
    busy_s = settings.slowed.busy_s if group.rank == settings.slowed.rank else 0.0

    def iterations() -> None:
        for i in range(settings.iterations):
            if busy_s and device.torch_device.type == "cuda":
                device.hold(busy_s)
            elif busy_s:
                time.sleep(busy_s)
            sent = recorder.call(i, step.dispatch, stats[0])
            step.combine(sent, stats[1])

    replay = device.capture(iterations)
    barrier()
    replay()  # ranks that leave the barrier late are waited for in here
    waits.zero_()
    start = device.stamp()
    replay()
    end = device.stamp()
    device.synchronize()
    group.synchronize()
    barrier()  # no rank closes the group before all are done
    counted = waits.cpu()
    return Waited(counted[0], counted[1], device.seconds(start, end) * 1e9, recorder.words())


def record_calls(rank: int, pg: dist.ProcessGroup, sizes: Sizes, names: Sequence[str]) -> dict[str, Tensor]:
    """Record one call of each of ``names``, back to back; a job of `World`, on GPUs. See `record_in`.

    Raises:
        WrongAnswer: rows came home wrong; nothing was recorded.
        ConfigError: the ranks are several nodes.
    """
    with ExpertGroup(pg, sizes.shape, backend="cuda") as group, torch.no_grad():
        need_one_node(group)
        return record_in(group, device_for("cuda"), lambda: dist.barrier(pg), sizes, names)


def record_in(
    group: ExpertGroup, device: Device, barrier: Barrier, sizes: Sizes, names: Sequence[str]
) -> dict[str, Tensor]:
    """Record in an open group.

    Everything runs in CUDA graphs. First the calls that align the clocks, in which each rank is late in turn; then
    `CHAIN` iterations of the calls in ``names``, back to back, of which the last is kept.

    Args:
        group: A group for ``sizes``; its kernels have to record time stamps.
        device: Device of the group.
        barrier: Returns when all ranks have called it.
        sizes: Sizes of the group and the inputs.
        names: ``"decode_dispatch"``, ``"decode_combine"``, or both.

    Returns:
        dict: ``"clocks"`` ``[CALIBRATIONS, blocks, TRACE_WORDS]``, and by name ``[blocks, TRACE_WORDS]``; on the CPU.
    """
    step = DecodeStep(group, sizes)
    step.check()
    clocks, kept = Recorder(group, CALIBRATIONS), {name: Recorder(group, 1) for name in names}
    ready = step.dispatch()

    def calibrate() -> None:
        for i in range(CALIBRATIONS):
            if i % group.num_ranks == group.rank:
                device.hold(CALIBRATION_LATE_S)
            clocks.call(i, step.dispatch)

    def chain() -> None:
        sent = ready
        for i in range(CHAIN):
            last = i == CHAIN - 1
            if "decode_dispatch" in kept:
                sent = kept["decode_dispatch"].call(0 if last else None, step.dispatch)
            if "decode_combine" in kept:
                kept["decode_combine"].call(0 if last else None, step.combine, sent)

    for replay in [device.capture(calibrate), device.capture(chain)]:
        barrier()
        replay()
        device.synchronize()
        barrier()
        replay()
        device.synchronize()
    group.synchronize()
    barrier()  # no rank closes the group before all are done
    found = {"clocks": clocks.words(), **{name: recorder.words() for name, recorder in kept.items()}}
    return {name: words if name == "clocks" else words[0] for name, words in found.items() if words is not None}


class Recorder:
    """Records time stamps inside single calls of a group, where its backend can.

    Args:
        group: The group.
        num_calls: The number of calls to record.
    """

    def __init__(self, group: ExpertGroup, num_calls: int) -> None:
        # The API has no method for this: only one backend can do it.
        self._backend = group._backend
        self._traces = self._backend.new_traces(num_calls)

    def call(self, i: int | None, do: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Make a call, the i-th of those that are recorded; None: it is not recorded."""
        if self._traces is None or i is None:
            return do(*args, **options)
        self._backend.set_trace(self._traces[i])
        try:
            return do(*args, **options)
        finally:
            self._backend.set_trace(None)

    def words(self) -> Tensor | None:
        """Return ``[num_calls, blocks, TRACE_WORDS]``, on the CPU; None where nothing is recorded."""
        return None if self._traces is None else self._traces.cpu()


class DecodeStep:
    """The two decode calls with inputs that are ready: FP8 on the way out and BF16 home; on CPUs BF16 both ways."""

    def __init__(self, group: ExpertGroup, sizes: Sizes) -> None:
        inputs = draw(sizes, 0, group.rank, group.device)
        self._group, self._x, self._routing = group, inputs.x, inputs.routing
        self._fp8 = Scale.FLOAT32 if group.backend == "cuda" else None
        sent = group.decode_dispatch(self._x, self._routing)
        self._y, self._plan = as_tensor(sent.x), sent.plan

    def check(self) -> None:
        """Check that tokens come home unchanged: experts answer with their rows, and a token's weights add up to 1.

        Raises:
            WrongAnswer: they do not.
        """
        home = self._group.decode_combine(self._y, self._plan).x
        self._group.synchronize()
        must_be_near("decode round trip", home.float(), self._x.float(), relative=2**-6, absolute=1e-6)

    def dispatch(self, stats: DecodeStats | None = None) -> DecodeDispatched[Tensor | Quantized]:
        """Make the dispatch."""
        return self._group.decode_dispatch(self._x, self._routing, quantize=self._fp8, stats=stats)

    def combine(self, sent: DecodeDispatched[Tensor | Quantized], stats: DecodeStats | None = None) -> DecodeCombined:
        """Make the combine of the experts' answers."""
        return self._group.decode_combine(self._y, sent.plan, stats=stats)
