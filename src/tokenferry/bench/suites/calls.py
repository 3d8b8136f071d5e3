"""The throughput calls on any device: dispatch and combine, plan kept and not, FP8 and BF16; sweeps of SMs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.bench.core.checks import (
    WrongAnswer,
    as_tensor,
    check_by_expert,
    check_rows,
    expected_sums,
    must_equal,
)
from tokenferry.bench.core.inputs import Inputs, Sizes, draw, expert, remote_rows
from tokenferry.bench.core.session import Label, Session, Settings, Step, expert_group, open_session
from tokenferry.errors import TokenferryError
from tokenferry.testing.world import Progress
from tokenferry.tuning import Topology, tune
from tokenferry.types import Dispatched, DispatchOptions, Layout, Plan, Quantized, Routing

ON_DEVICE = DispatchOptions(counts="device")
BY_EXPERT = DispatchOptions(Layout.EXPERTS)
MANY_TOKENS = 4096

Rows = Callable[["Ready"], "Tensor | Quantized"]


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """One set of inputs and the results of a first dispatch.

    Attributes:
        inputs: Inputs of this rank.
        routing: Their routing.
        plan: Plan of `dispatch`.
        y: ``[N, H]`` bfloat16: this rank's answers, in ordinary memory.
    """

    inputs: Inputs
    routing: Routing
    plan: Plan
    y: Tensor


ROWS: dict[str, Rows] = {"fp8": lambda ready: ready.inputs.quantized, "bf16": lambda ready: ready.inputs.x}
"""The rows that a dispatch sends, by `Label.rows`."""


def measure_calls(rank: int, pg: dist.ProcessGroup, progress: Progress, settings: Settings) -> None:
    """Measure the calls for every T; a job of `World` (through `run_with_progress`)."""
    with open_session(pg, progress, settings) as session:
        for tokens in settings.tokens:
            _measure_tokens(session, settings.sizes(tokens), in_full=True)
        for routing in settings.routings:
            if routing != "uniform":
                _measure_tokens(session, settings.sizes(settings.sweep_tokens, routing), in_full=False)


def measure_sms(rank: int, pg: dist.ProcessGroup, progress: Progress, settings: Settings) -> None:
    """Measure the calls with plans kept for every number of SMs; a job of `World`."""
    with open_session(pg, progress, settings) as session:
        cases = _Cases.make(session, settings.sizes(settings.sweep_tokens))
        if cases is None:
            return
        with cases:
            for num_sms in settings.sms:
                cases.redispatch(num_sms)
                cases.combine(num_sms)


def num_variants(tokens: int) -> int:
    """Return the number of sets of inputs in rotation: fewer where they are far larger than any cache."""
    return 3 if tokens < MANY_TOKENS else 2


def _measure_tokens(session: Session, sizes: Sizes, *, in_full: bool) -> None:
    cases = _Cases.make(session, sizes)
    if cases is None:
        return
    with cases:
        cases.redispatch(None)
        cases.dispatch()
        cases.combine(None)
        if in_full and sizes.tokens in (128, session.settings.sweep_tokens):
            cases.dispatch_variants()


class _Cases:
    """The cases of one T and routing: one group, its sets of inputs, checked. A context manager."""

    def __init__(self, session: Session, sizes: Sizes) -> None:
        self.session, self.sizes = session, sizes
        self._opened = expert_group(session, sizes.tokens)
        self.group = self._opened.__enter__()
        self.variants = num_variants(sizes.tokens)
        self.out, self.home = remote_rows(sizes, self.variants, session.rank, session.device.torch_device)
        self.ready: list[Ready] = []

    @classmethod
    def make(cls, session: Session, sizes: Sizes) -> _Cases | None:
        """Make the group and check every set of inputs; None if that failed, which has been reported. Collective."""
        what = f"tokenferry: group and first dispatch, T={sizes.tokens}, {sizes.routing}"
        session.send({"now": what})
        cases = session.attempt(what, lambda: cls(session, sizes))
        if cases is None:
            return None
        assert isinstance(cases, cls)
        ready = session.attempt(what, lambda: [cases._prepare(variant) for variant in range(cases.variants)])
        if ready is None:
            cases.__exit__()
            return None
        cases.ready = ready
        return cases

    def __enter__(self) -> _Cases:
        return self

    def __exit__(self, *args: object) -> None:
        self.ready = []
        self._opened.__exit__(None, None, None)

    def redispatch(self, num_sms: int | None) -> None:
        """Measure dispatch with the plan kept: FP8 and BF16."""
        for name, rows in ROWS.items():

            def call(ready: Ready, rows: Rows = rows) -> Dispatched[Tensor | Quantized]:
                return self.group.redispatch(rows(ready), ready.plan, num_sms=num_sms)

            self._case("dispatch, plan kept", name, num_sms, self._prepared("redispatch", call))

    def dispatch(self) -> None:
        """Measure dispatch that makes its plan, counts on the host: FP8 and BF16."""
        for name, rows in ROWS.items():

            def call(ready: Ready, rows: Rows = rows) -> Dispatched[Tensor | Quantized]:
                return self.group.dispatch(rows(ready), ready.routing)

            self._case("dispatch", name, None, self._prepared("dispatch", call))

    def dispatch_variants(self) -> None:
        """Measure dispatch with counts on the device, and with rows by expert."""

        def on_device(ready: Ready) -> Dispatched[Tensor | Quantized]:
            return self.group.dispatch(ready.inputs.quantized, ready.routing, options=ON_DEVICE)

        def by_expert() -> Step:
            for v, ready in enumerate(self.ready):
                sent = self.group.dispatch(ready.inputs.x, ready.routing, options=BY_EXPERT)
                check_by_expert("dispatch, EXPERTS", self.sizes, v, self.session.rank, groups_of(sent))
            return lambda i: self.group.dispatch(self._at(i).inputs.x, self._at(i).routing, options=BY_EXPERT)

        self._case("dispatch, counts on device", "fp8", None, self._prepared("dispatch", on_device))
        self._case("dispatch, by expert", "bf16", None, by_expert)

    def combine(self, num_sms: int | None) -> None:
        """Measure combine of rows in memory of the group, and in the user's."""

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

    def _prepared(self, what: str, call: Callable[[Ready], Dispatched[Tensor | Quantized]]) -> Callable[[], Step]:
        """Return what checks the rows of a call for every set of inputs and returns it as a step."""

        def prepare() -> Step:
            for variant, ready in enumerate(self.ready):
                check_rows(what, self.sizes, variant, self.session.rank, _received(call(ready)))
            return lambda i: call(self._at(i))

        return prepare

    def _prepare(self, variant: int) -> Ready:
        inputs = draw(self.sizes, variant, self.session.rank, self.session.device.torch_device)
        routing = inputs.routing
        sent = self.group.dispatch(inputs.x, routing)
        check_rows("dispatch", self.sizes, variant, self.session.rank, sent.x)
        return Ready(inputs, routing, sent.plan, expert(as_tensor(sent.x), self.session.rank))

    def _heap_rows(self) -> list[Tensor]:
        """Return as many sets of rows as fit into the heap. Collective."""
        rows: list[Tensor] = []
        full = None
        for ready in self.ready:
            try:
                rows.append(self.group.empty_rows(ready.plan))
            except TokenferryError as error:
                full = error
                break
        # Ranks have to combine the same plans in the same order, so that all take the smallest number.
        common = min(self.session.gather(len(rows)))
        if common == 0:
            raise full or WrongAnswer("one set of rows does not fit into the heap of another rank")
        return rows[:common]

    def _case(self, call: str, rows: str, num_sms: int | None, prepare: Callable[[], Step]) -> None:
        kind = kind_of(call)
        label = Label(
            library="tokenferry",
            call=call,
            rows=rows,
            tokens=self.sizes.tokens,
            routing=self.sizes.routing,
            num_sms=num_sms or default_sms(self.session, self.group, call),
            link="load" if kind == "fetch" else "store",
            row_bytes=self.sizes.fp8_row_bytes if rows == "fp8" else 2 * self.sizes.hidden,
            rows_out=self.out if kind == "dispatch" else self.home,
        )
        self.session.case(label, prepare)


def kind_of(call: str) -> str:
    """Return how a call uses the links: ``"dispatch"``; combine: ``"push"`` (rows in user memory) or ``"fetch"``."""
    if not call.startswith("combine"):
        return "dispatch"
    return "push" if "user memory" in call else "fetch"


def default_sms(session: Session, group: ExpertGroup, call: str) -> int | None:
    """Return the SMs that a call takes by itself; None on the CPU."""
    num_sms = session.device.num_sms
    if num_sms == 0:
        return None
    tuned = tune(group.shape, Topology(group.num_ranks, num_sms))
    return {"dispatch": tuned.dispatch_sms, "fetch": tuned.combine_sms, "push": tuned.push_sms}[kind_of(call)]


def groups_of(sent: Dispatched[Tensor | Quantized]) -> list[Tensor]:
    """Return the rows of each local expert of a dispatch with ``Layout.EXPERTS``; waits for the counts."""
    assert sent.expert_offsets is not None
    starts = sent.expert_offsets.tolist()
    rows = as_tensor(sent.x)
    return [rows[start : start + count] for start, count in zip(starts, sent.expert_counts.tolist(), strict=False)]


def _received(sent: Dispatched[Tensor | Quantized]) -> Tensor | Quantized:
    """Return the rows that hold data: more may be there if the counts stayed on the device."""
    if sent.plan.num_received is not None:
        return sent.x
    n = int(sent.plan.src_counts.sum())
    if isinstance(sent.x, Tensor):
        return sent.x[:n]
    return Quantized(sent.x.data[:n], sent.x.scale[:n])
