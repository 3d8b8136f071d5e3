"""Rounds of decode calls on all ranks, watched: how long ranks waited for one another, what kernels wrote down.

Jobs of `World`. What they find out is put together by `tokenferry.bench.profile.timeline` and
`tokenferry.bench.profile.diagnose`.
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
from tokenferry.bench.core.device import Bed, bed_for
from tokenferry.bench.core.inputs import Spec, draw, must_be_near
from tokenferry.types import DecodeCombined, DecodeDispatched, DecodeStats, MoeShape, Routing, Scale

CALIBRATIONS = 64
"""Calls from which the clocks of ranks are brought together; each rank is late in every R-th."""
CALIBRATION_LATE_S = 30e-6
CHAIN = 16
"""Calls back to back, of which the last is recorded."""

Barrier = Callable[[], object]
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Waited:
    """What one rank counted.

    Attributes:
        dispatch_ns: ``[R]`` int64: what it waited for messages of each rank in the dispatches of all rounds.
        combine_ns: The same of the combines.
        took_ns: What all rounds took.
        words: ``[rounds, blocks, TRACE_WORDS]`` of the dispatches; None where kernels write nothing down.
    """

    dispatch_ns: Tensor
    combine_ns: Tensor
    took_ns: float
    words: Tensor | None


def shape_of(spec: Spec) -> MoeShape:
    """The group's."""
    return MoeShape(spec.experts, spec.top_k, spec.hidden, max_tokens=spec.tokens)


def count_waits(rank: int, pg: dist.ProcessGroup, device: str, spec: Spec, slow: tuple[int, float]) -> Waited:
    """Run ``spec.iters`` rounds of dispatch and combine; see `count_in`. A job of `World`.

    Raises:
        WrongAnswer: rows came home wrong; nothing was counted.
    """
    with ExpertGroup(pg, shape_of(spec), backend=device) as group, torch.no_grad():
        return count_in(group, bed_for(device), lambda: dist.barrier(pg), spec, slow)


def count_in(group: ExpertGroup, bed: Bed, barrier: Barrier, spec: Spec, slow: tuple[int, float]) -> Waited:
    """Count, in a group that there is; on GPUs the rounds are one CUDA graph, so that hosts have no part in it.

    All rounds run twice, back to back; those of the second time are counted.

    Args:
        group: For the sizes of ``spec``.
        bed: Of the group's device.
        barrier: Returns when all ranks have called it.
        spec: Sizes, rounds (``iters``), seed.
        slow: A rank, and the seconds that it is busy before each round; (-1, 0.0): none.
    """
    step = Step(group, spec)
    step.check()
    waits = torch.zeros(2, group.num_ranks, dtype=torch.int64, device=group.device)
    stats = [DecodeStats(wait_ns=one) for one in waits]
    recorder = Recorder(group, spec.iters)
    busy_s = slow[1] if group.rank == slow[0] else 0.0

    def rounds() -> None:
        for i in range(spec.iters):
            if busy_s and bed.device.type == "cuda":
                bed.hold(busy_s)
            elif busy_s:
                time.sleep(busy_s)
            sent = recorder.call(i, step.dispatch, stats[0])
            step.combine(sent, stats[1])

    replay = bed.capture(rounds)
    barrier()
    replay()  # who leaves the barrier late is waited for in here
    waits.zero_()
    start = bed.stamp()
    replay()
    end = bed.stamp()
    bed.synchronize()
    group.synchronize()
    barrier()  # nobody closes the group before all are done
    counted = waits.cpu()
    return Waited(counted[0], counted[1], bed.seconds(start, end) * 1e9, recorder.words())


def record_calls(rank: int, pg: dist.ProcessGroup, spec: Spec, names: Sequence[str]) -> dict[str, Tensor]:
    """Record one call of each of ``names``, chained; a job of `World`, on GPUs. See `record_in`.

    Raises:
        WrongAnswer: rows came home wrong; nothing was recorded.
    """
    with ExpertGroup(pg, shape_of(spec), backend="cuda") as group, torch.no_grad():
        return record_in(group, bed_for("cuda"), lambda: dist.barrier(pg), spec, names)


def record_in(group: ExpertGroup, bed: Bed, barrier: Barrier, spec: Spec, names: Sequence[str]) -> dict[str, Tensor]:
    """Record in a group that there is.

    Everything runs in CUDA graphs. First the calls that bring the clocks together, in which each rank is late in turn;
    then `CHAIN` rounds of the calls in ``names``, back to back, of which the last is kept.

    Args:
        group: For the sizes of ``spec``; its kernels have to write down what they do.
        bed: Of the group's device.
        barrier: Returns when all ranks have called it.
        spec: Sizes and seed.
        names: ``"decode_dispatch"``, ``"decode_combine"``, or both.

    Returns:
        dict: ``"clocks"`` ``[CALIBRATIONS, blocks, TRACE_WORDS]``, and by name ``[blocks, TRACE_WORDS]``; on the CPU.
    """
    step = Step(group, spec)
    step.check()
    clocks, kept = Recorder(group, CALIBRATIONS), {name: Recorder(group, 1) for name in names}
    ready = step.dispatch()

    def calibrate() -> None:
        for i in range(CALIBRATIONS):
            if i % group.num_ranks == group.rank:
                bed.hold(CALIBRATION_LATE_S)
            clocks.call(i, step.dispatch)

    def chain() -> None:
        sent = ready
        for i in range(CHAIN):
            last = i == CHAIN - 1
            if "decode_dispatch" in kept:
                sent = kept["decode_dispatch"].call(0 if last else None, step.dispatch)
            if "decode_combine" in kept:
                kept["decode_combine"].call(0 if last else None, step.combine, sent)

    for replay in [bed.capture(calibrate), bed.capture(chain)]:
        barrier()
        replay()
        bed.synchronize()
        barrier()
        replay()
        bed.synchronize()
    group.synchronize()
    barrier()  # nobody closes the group before all are done
    found = {"clocks": clocks.words(), **{name: recorder.words() for name, recorder in kept.items()}}
    return {name: words if name == "clocks" else words[0] for name, words in found.items() if words is not None}


class Recorder:
    """Lets single calls of a group write down when what happened, where its backend can.

    Args:
        group: The group.
        num_calls: How many calls there will be.
    """

    def __init__(self, group: ExpertGroup, num_calls: int) -> None:
        # What only some backends can do has no place in the API.
        self._backend = group._backend
        self._traces = self._backend.new_traces(num_calls)

    def call(self, i: int | None, do: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Make a call, the i-th of those that are recorded; None: it is not."""
        if self._traces is None or i is None:
            return do(*args, **options)
        self._backend.set_trace(self._traces[i])
        try:
            return do(*args, **options)
        finally:
            self._backend.set_trace(None)

    def words(self) -> Tensor | None:
        """``[num_calls, blocks, TRACE_WORDS]``, on the CPU; None where nothing is written down."""
        return None if self._traces is None else self._traces.cpu()


class Step:
    """The two calls with inputs that are ready: FP8 on the way out and BF16 home on GPUs; on CPUs BF16 both ways."""

    def __init__(self, group: ExpertGroup, spec: Spec) -> None:
        inputs = draw(spec, 0, group.rank)
        self._group = group
        self._x = inputs.x.to(group.device)
        self._routing = Routing(inputs.topk_idx.to(group.device), inputs.topk_weights.to(group.device))
        self._fp8 = Scale.FLOAT32 if group.backend == "cuda" else None
        sent = group.decode_dispatch(self._x, self._routing)
        assert isinstance(sent.x, Tensor)
        self._y, self._plan = sent.x, sent.plan

    def check(self) -> None:
        """Whether tokens come home as they went: experts answer what they got, and a token's weights add up to 1.

        Raises:
            WrongAnswer: it does not.
        """
        home = self._group.decode_combine(self._y, self._plan).x
        self._group.synchronize()
        must_be_near("decode round trip", home.float(), self._x.float(), relative=2**-6, absolute=1e-6)

    def dispatch(self, stats: DecodeStats | None = None) -> DecodeDispatched:
        """Send."""
        return self._group.decode_dispatch(self._x, self._routing, quantize=self._fp8, stats=stats)

    def combine(self, sent: DecodeDispatched, stats: DecodeStats | None = None) -> DecodeCombined:
        """Bring home what the experts answered."""
        return self._group.decode_combine(self._y, sent.plan, stats=stats)
