"""The throughput calls on any device: dispatch and combine, plan kept and not, FP8 and BF16; sweeps of SMs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.bench.core.checks import WrongAnswer, as_tensor, check_rows
from tokenferry.bench.core.inputs import Inputs, Sizes, remote_rows
from tokenferry.bench.core.session import Label, Session, Step, expert_group
from tokenferry.bench.core.sets import Sets
from tokenferry.errors import TokenferryError
from tokenferry.tuning import Machine, tune
from tokenferry.types import Dispatched, DispatchOptions, Layout, Plan, Quantized

ON_DEVICE = DispatchOptions(counts="device")
BY_EXPERT = DispatchOptions(Layout.EXPERTS)
ROWS = ("fp8", "bf16")


def measure_calls(session: Session) -> None:
    """Measure the calls for every T."""
    settings = session.settings
    for tokens in settings.tokens:
        _measure_tokens(session, settings.sizes(tokens), in_full=True)
    for routing in settings.routings:
        if routing != "uniform":
            _measure_tokens(session, settings.sizes(settings.sweep_tokens, routing), in_full=False)


def measure_sms(session: Session) -> None:
    """Measure the calls with plans kept for every number of SMs."""
    settings = session.settings
    with _checked(session, settings.sizes(settings.sweep_tokens)) as cases:
        if cases is None:
            return
        for num_sms in settings.sms:
            cases.redispatch(num_sms)
            cases.combine(num_sms)


def _measure_tokens(session: Session, sizes: Sizes, *, in_full: bool) -> None:
    with _checked(session, sizes) as cases:
        if cases is None:
            return
        cases.redispatch(None)
        cases.dispatch()
        cases.combine(None)
        if in_full and sizes.tokens in (128, session.settings.sweep_tokens):
            cases.dispatch_variants()


@contextmanager
def _checked(session: Session, sizes: Sizes) -> Iterator[_Cases | None]:
    """Open a group and check its dispatch; yield None if that failed, which has been reported. Collective."""
    what = f"tokenferry: group and first dispatch, T={sizes.tokens}, {sizes.routing}"
    with ExitStack() as stack:
        group = session.attempt(what, stack.enter_context, expert_group(session, sizes.tokens))
        yield None if group is None else session.attempt(what, _Cases, session, sizes, group)


class _Cases:
    """The cases of one T and routing: a group and its sets of inputs, checked. Making it is collective."""

    def __init__(self, session: Session, sizes: Sizes, group: ExpertGroup) -> None:
        self.session, self.sizes, self.group = session, sizes, group
        self.sets = Sets(session, sizes)
        self.out, self.home = remote_rows(sizes, len(self.sets.inputs), session.rank, session.device.torch_device)
        self.ready = self.sets.ready(self._dispatch)

    def redispatch(self, num_sms: int | None) -> None:
        """Measure dispatch with the plan kept: FP8 and BF16."""
        for rows in ROWS:

            def call(v: int, rows: str = rows) -> Tensor | Quantized:
                return self.group.redispatch(self.sets.rows(v, rows), self.ready[v].plan, num_sms=num_sms).x

            self._case("dispatch, plan kept", rows, num_sms, partial(self.sets.dispatch_step, "redispatch", call))

    def dispatch(self) -> None:
        """Measure dispatch that makes its plan, counts on the host: FP8 and BF16."""
        for rows in ROWS:

            def call(v: int, rows: str = rows) -> Tensor | Quantized:
                return self.group.dispatch(self.sets.rows(v, rows), self.ready[v].routing).x

            self._case("dispatch", rows, None, partial(self.sets.dispatch_step, "dispatch", call))

    def dispatch_variants(self) -> None:
        """Measure dispatch with counts on the device, and with rows by expert."""
        sets, ready = self.sets, self.ready

        def on_device(v: int) -> Dispatched[Quantized]:
            return self.group.dispatch(sets.inputs[v].quantized, ready[v].routing, options=ON_DEVICE)

        def by_expert(v: int) -> Dispatched[Tensor]:
            return self.group.dispatch(sets.inputs[v].x, ready[v].routing, options=BY_EXPERT)

        def check(v: int, sent: Dispatched[Quantized]) -> None:
            n = int(sent.plan.src_counts.sum())  # rows beyond hold no data
            rows = Quantized(sent.x.data[:n], sent.x.scale[:n])
            check_rows("dispatch", self.sizes, v, self.session.rank, rows)

        self._case("dispatch, counts on device", "fp8", None, lambda: sets.step(on_device, check))
        what = "dispatch, EXPERTS"
        self._case("dispatch, by expert", "bf16", None, lambda: sets.expert_step(what, by_expert, groups_of))

    def combine(self, num_sms: int | None) -> None:
        """Measure combine of rows in memory of the group, and in the user's."""

        def step_of(rows: list[Tensor]) -> Step:
            for ready, y in zip(self.ready, rows, strict=False):
                y.copy_(ready.y)

            def call(v: int) -> Tensor:
                return self.group.combine(rows[v], self.ready[v].plan, num_sms=num_sms).x

            return self.sets.combine_step("combine", call, len(rows))

        self._case("combine, rows in the group's memory", "bf16", num_sms, lambda: step_of(self._heap_rows()))
        self._case("combine, rows in user memory", "bf16", num_sms, lambda: step_of([one.y for one in self.ready]))

    def _dispatch(self, inputs: Inputs) -> tuple[Tensor, Plan]:
        sent = self.group.dispatch(inputs.x, inputs.routing)
        return as_tensor(sent.x), sent.plan

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
            row_bytes=self.sizes.row_bytes(rows),
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
    tuned = tune(group.shape, Machine(group.num_ranks, num_sms))
    return {"dispatch": tuned.dispatch_sms, "fetch": tuned.combine_sms, "push": tuned.push_sms}[kind_of(call)]


def groups_of(sent: Dispatched[Tensor | Quantized]) -> list[Tensor]:
    """Return the rows of each local expert of a dispatch with ``Layout.EXPERTS``; waits for the counts."""
    assert sent.expert_offsets is not None
    starts = sent.expert_offsets.tolist()
    rows = as_tensor(sent.x)
    return [rows[start : start + count] for start, count in zip(starts, sent.expert_counts.tolist(), strict=False)]
