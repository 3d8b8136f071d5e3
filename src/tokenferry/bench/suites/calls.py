"""The throughput calls on any device: dispatch and combine, plan kept and not, FP8 and BF16; sweeps of SMs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.bench.core.clock import Step
from tokenferry.bench.core.device import gather
from tokenferry.bench.core.inputs import WrongAnswer, expert, must_equal
from tokenferry.bench.core.session import Label, Settings, Trial, expert_group, trial
from tokenferry.bench.core.static_inputs import (
    Inputs,
    Sizes,
    check_by_expert,
    check_rows,
    data_of,
    draw,
    expected_sums,
    remote_rows,
    scale_of,
)
from tokenferry.errors import TokenferryError
from tokenferry.tuning import Topology, tune
from tokenferry.types import Dispatched, DispatchOptions, Layout, Plan, Quantized, Routing

ON_DEVICE = DispatchOptions(counts="device")
BY_EXPERT = DispatchOptions(Layout.EXPERTS)
MANY_TOKENS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """One set of inputs and what a first dispatch made of it.

    Attributes:
        inputs: This rank's.
        routing: The same, as the library takes it.
        quantized: The same.
        plan: Of `dispatch`.
        y: ``[N, H]`` bfloat16: this rank's answers, in ordinary memory.
    """

    inputs: Inputs
    routing: Routing
    quantized: Quantized
    plan: Plan
    y: Tensor


def measure_calls(rank: int, pg: dist.ProcessGroup, news: str, settings: Settings) -> None:
    """Measure the calls for every T; a job of `World` (through `run_with_feed`). Results go to the news."""
    with trial(rank, pg, news, settings) as here:
        for tokens in settings.tokens:
            _measure_tokens(here, settings.sizes(tokens), in_full=True)
        for routing in settings.routings:
            if routing != "uniform":
                _measure_tokens(here, settings.sizes(settings.sweep_tokens, routing), in_full=False)


def measure_sms(rank: int, pg: dist.ProcessGroup, news: str, settings: Settings) -> None:
    """Measure the calls with plans kept for every number of SMs; a job of `World`."""
    with trial(rank, pg, news, settings) as here:
        sizes = settings.sizes(settings.sweep_tokens)
        cases = _Cases.make(here, sizes)
        if cases is None:
            return
        with cases:
            for num_sms in settings.sms:
                cases.redispatch(num_sms)
                cases.combine(num_sms)


def num_variants(tokens: int) -> int:
    """Sets of inputs in rotation: fewer where they are far larger than any cache."""
    return 3 if tokens < MANY_TOKENS else 2


def _measure_tokens(here: Trial, sizes: Sizes, *, in_full: bool) -> None:
    cases = _Cases.make(here, sizes)
    if cases is None:
        return
    with cases:
        cases.redispatch(None)
        cases.dispatch()
        cases.combine(None)
        if in_full and sizes.tokens in (128, here.settings.sweep_tokens):
            cases.dispatch_variants()


class _Cases:
    """The cases of one T and routing: one group, its sets of inputs, checked. A context manager."""

    def __init__(self, here: Trial, sizes: Sizes) -> None:
        self.here, self.sizes = here, sizes
        self._door = expert_group(here, sizes.tokens)
        self.group = self._door.__enter__()
        self.variants = num_variants(sizes.tokens)
        self.out, self.home = remote_rows(sizes, self.variants, here.rank, here.bed.device)
        self.ready: list[Ready] = []

    @classmethod
    def make(cls, here: Trial, sizes: Sizes) -> _Cases | None:
        """Make the group and check every set of inputs; None if that failed, which has been told. Collective."""
        what = f"tokenferry: group and first dispatch, T={sizes.tokens}, {sizes.routing}"
        here.tell({"now": what})
        cases = here.attempt(what, lambda: cls(here, sizes))
        if cases is None:
            return None
        assert isinstance(cases, cls)
        ready = here.attempt(what, lambda: [cases._prepare(variant) for variant in range(cases.variants)])
        if ready is None:
            cases.__exit__()
            return None
        cases.ready = ready
        return cases

    def __enter__(self) -> _Cases:
        return self

    def __exit__(self, *args: object) -> None:
        self.ready = []
        self._door.__exit__(None, None, None)

    def redispatch(self, num_sms: int | None) -> None:
        """Plan kept: FP8 and BF16."""

        def fp8() -> Step:
            for v, ready in enumerate(self.ready):
                sent = self.group.redispatch(ready.quantized, ready.plan, num_sms=num_sms)
                self._check("redispatch", v, sent, fp8=True)
            return lambda i: self.group.redispatch(self._at(i).quantized, self._at(i).plan, num_sms=num_sms)

        def bf16() -> Step:
            for v, ready in enumerate(self.ready):
                self._check("redispatch", v, self.group.redispatch(ready.inputs.x, ready.plan, num_sms=num_sms))
            return lambda i: self.group.redispatch(self._at(i).inputs.x, self._at(i).plan, num_sms=num_sms)

        self._case("dispatch, plan kept", "fp8", num_sms, fp8)
        self._case("dispatch, plan kept", "bf16", num_sms, bf16)

    def dispatch(self) -> None:
        """Plan made, counts on the host: FP8 and BF16."""

        def fp8() -> Step:
            for v, ready in enumerate(self.ready):
                self._check("dispatch", v, self.group.dispatch(ready.quantized, ready.routing), fp8=True)
            return lambda i: self.group.dispatch(self._at(i).quantized, self._at(i).routing)

        def bf16() -> Step:
            return lambda i: self.group.dispatch(self._at(i).inputs.x, self._at(i).routing)  # checked by _prepare

        self._case("dispatch", "fp8", None, fp8)
        self._case("dispatch", "bf16", None, bf16)

    def dispatch_variants(self) -> None:
        """Plan made, otherwise than by default: counts on the device; rows by expert."""

        def on_device() -> Step:
            for v, ready in enumerate(self.ready):
                sent = self.group.dispatch(ready.quantized, ready.routing, options=ON_DEVICE)
                self._check("dispatch", v, _trimmed(sent), fp8=True)
            return lambda i: self.group.dispatch(self._at(i).quantized, self._at(i).routing, options=ON_DEVICE)

        def by_expert() -> Step:
            for v, ready in enumerate(self.ready):
                sent = self.group.dispatch(ready.inputs.x, ready.routing, options=BY_EXPERT)
                check_by_expert("dispatch, EXPERTS", self.sizes, v, self.here.rank, groups_of(sent))
            return lambda i: self.group.dispatch(self._at(i).inputs.x, self._at(i).routing, options=BY_EXPERT)

        self._case("dispatch, counts on device", "fp8", None, on_device)
        self._case("dispatch, by expert", "bf16", None, by_expert)

    def combine(self, num_sms: int | None) -> None:
        """Rows in memory of the group, and in the user's."""

        def step_of(rows: list[Tensor]) -> Step:
            for ready, y in zip(self.ready, rows, strict=False):
                y.copy_(ready.y)
                sums = self.group.combine(y, ready.plan, num_sms=num_sms).x
                must_equal("combine", sums, expected_sums(self.sizes, ready.inputs))
            n = len(rows)
            return lambda i: self.group.combine(rows[i % n], self.ready[i % n].plan, num_sms=num_sms)

        self._case("combine, rows in the group's memory", "bf16", num_sms, lambda: step_of(self._heap_rows()))
        self._case("combine, rows in user memory", "bf16", num_sms, lambda: step_of([r.y for r in self.ready]))

    def _at(self, i: int) -> Ready:
        return self.ready[i % self.variants]

    def _prepare(self, variant: int) -> Ready:
        inputs = draw(self.sizes, variant, self.here.rank, self.here.bed.device)
        routing = Routing(inputs.topk_idx, inputs.topk_weights)
        sent = self.group.dispatch(inputs.x, routing)
        self._check("dispatch", variant, sent)
        y = expert(_rows(sent), self.here.rank)
        return Ready(inputs, routing, Quantized(inputs.data, inputs.scale), sent.plan, y)

    def _heap_rows(self) -> list[Tensor]:
        """As many sets as the heap has room for. Collective."""
        rows: list[Tensor] = []
        full = None
        for ready in self.ready:
            try:
                rows.append(self.group.empty_rows(ready.plan))
            except TokenferryError as error:
                full = error
                break
        # Ranks have to combine the same plans in the same order, so that all take the smallest number.
        common = min(gather(self.here.pg, len(rows)))
        if common == 0:
            raise full or WrongAnswer("another rank has no room for one set of rows")
        return rows[:common]

    def _check(self, what: str, variant: int, sent: Dispatched[Tensor | Quantized], *, fp8: bool = False) -> None:
        if not fp8:
            check_rows(what, self.sizes, variant, self.here.rank, ((_rows(sent), lambda inputs: inputs.x),))
            return
        if not isinstance(sent.x, Quantized):
            raise WrongAnswer(f"{what}: expected a Quantized, got {type(sent.x).__name__}")
        got = ((sent.x.data, data_of), (sent.x.scale, scale_of))
        check_rows(f"{what}, FP8", self.sizes, variant, self.here.rank, got)

    def _case(self, call: str, rows: str, num_sms: int | None, prepare: Callable[[], Step]) -> None:
        kind = kind_of(call)
        row_bytes = self.sizes.hidden + 4 * (self.sizes.hidden // 128) if rows == "fp8" else 2 * self.sizes.hidden
        label = Label(
            who="tokenferry",
            call=call,
            rows=rows,
            tokens=self.sizes.tokens,
            routing=self.sizes.routing,
            num_sms=num_sms or default_sms(self.here, self.group, call),
            link="load" if kind == "fetch" else "store",
            row_bytes=row_bytes,
            rows_out=self.out if kind == "dispatch" else self.home,
        )
        self.here.case(label, prepare)


def kind_of(call: str) -> str:
    """How a call uses the links: ``"dispatch"``; combine: ``"push"`` of rows in user memory, else ``"fetch"``."""
    if not call.startswith("combine"):
        return "dispatch"
    return "push" if "user memory" in call else "fetch"


def default_sms(here: Trial, group: ExpertGroup, call: str) -> int | None:
    """The SMs that a call takes by itself; None on the CPU."""
    num_sms = here.bed.num_sms
    if num_sms == 0:
        return None
    tuned = tune(group.shape, Topology(group.num_ranks, num_sms))
    return {"dispatch": tuned.dispatch_sms, "fetch": tuned.combine_sms, "push": tuned.push_sms}[kind_of(call)]


def groups_of(sent: Dispatched[Tensor | Quantized]) -> list[Tensor]:
    """The rows of each local expert of a dispatch with ``Layout.EXPERTS``; waits for the counts."""
    assert sent.expert_offsets is not None
    starts = sent.expert_offsets.tolist()
    rows = _rows(sent)
    return [rows[start : start + count] for start, count in zip(starts, sent.expert_counts.tolist(), strict=False)]


def _trimmed(sent: Dispatched[Tensor | Quantized]) -> Dispatched[Quantized]:
    """A dispatch whose counts stayed on the device, without what holds no data."""
    assert isinstance(sent.x, Quantized)
    n = int(sent.plan.src_counts.sum())
    x = Quantized(sent.x.data[:n], sent.x.scale[:n])
    return Dispatched(x, None, None, sent.expert_counts, None, None, sent.plan)


def _rows(sent: Dispatched[Tensor | Quantized]) -> Tensor:
    if not isinstance(sent.x, Tensor):
        raise WrongAnswer(f"expected rows as a Tensor, got {type(sent.x).__name__}")
    return sent.x
