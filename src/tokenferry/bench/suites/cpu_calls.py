"""The calls of the CPU backend, each in turns with all_to_all_single of the same bytes between the same ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.bench.baselines.gloo import RowExchange, row_exchanges
from tokenferry.bench.core.checks import as_tensor, check_rows, expected_sums, must_equal
from tokenferry.bench.core.inputs import FP8_COLUMNS, Inputs, draw, expert
from tokenferry.bench.core.session import Label, Runs, Session, Settings, Step
from tokenferry.bench.suites.decode_reference import DecodeReference, Pool
from tokenferry.types import DecodePlan, Numerics, Plan, Routing, Scale, TransportName

VARIANTS = 3
"""Sets of inputs that the iterations go through, so that no cache or branch learns one routing."""

RUNS = Runs(warmup=2, samples=10, calls=1)


@dataclass(frozen=True, slots=True, eq=False)
class Checked:
    """One set of inputs, checked: what the timed calls start from.

    Attributes:
        x: This rank's rows.
        routing: Their routing.
        plan: Plan of `dispatch`.
        y: ``[N, H]``: this rank's answers, for `combine`.
        decode_plan: Plan of `decode_dispatch`.
        decode_y: ``[L, R*M, H]``: the answers of this rank's experts, for `decode_combine`.
    """

    x: Tensor
    routing: Routing
    plan: Plan
    y: Tensor
    decode_plan: DecodePlan
    decode_y: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call, and the directions in which its rows travel: names of `row_exchanges`."""

    name: str
    make: Callable[[ExpertGroup, Checked], object]
    directions: tuple[str, ...]
    rows: str = "bf16"


def _pair(group: ExpertGroup, ready: Checked) -> object:
    return group.combine(ready.y, group.dispatch(ready.x, ready.routing).plan)


def _decode_pair(group: ExpertGroup, ready: Checked, numerics: Numerics = "exact") -> object:
    sent = group.decode_dispatch(ready.x, ready.routing)
    return group.decode_combine(ready.decode_y, sent.plan, numerics=numerics)


CALLS = (
    Call("dispatch + combine", _pair, ("out", "home")),
    Call("dispatch", lambda g, r: g.dispatch(r.x, r.routing), ("out",)),
    Call("redispatch (plan kept)", lambda g, r: g.redispatch(r.x, r.plan), ("out",)),
    Call("combine", lambda g, r: g.combine(r.y, r.plan), ("home",)),
    Call("decode pair, exact", _decode_pair, ("out", "answers")),
    Call("decode pair, fast", lambda g, r: _decode_pair(g, r, "fast"), ("out", "home")),
    Call("decode dispatch", lambda g, r: g.decode_dispatch(r.x, r.routing), ("out",)),
    Call("decode combine, exact", lambda g, r: g.decode_combine(r.decode_y, r.decode_plan), ("answers",)),
    Call(
        "decode dispatch, FP8",
        lambda g, r: g.decode_dispatch(r.x, r.routing, quantize=Scale.FLOAT32),
        ("out fp8",),
        rows="fp8",
    ),
)


def calls_for(settings: Settings) -> Sequence[Call]:
    """Return the calls to measure: FP8 only where H is a multiple of the columns of a scale."""
    return [call for call in CALLS if call.rows == "bf16" or settings.hidden % FP8_COLUMNS == 0]


@torch.no_grad()
def measure_cpu_calls(session: Session, transport: TransportName) -> None:
    """Check, then time every call over one transport.

    Raises:
        WrongAnswer: a check failed; nothing was timed.
    """
    settings = session.settings
    sizes = settings.sizes(settings.tokens[0])
    with ExpertGroup(session.pg, sizes.shape, backend="cpu", transport=transport) as group:
        session.send({"now": "checking every answer"})
        pool = Pool(sizes, session.device.torch_device)
        ready = [_checked(session, group, variant, pool) for variant in range(VARIANTS)]
        exchanges = row_exchanges(session.pg, sizes, VARIANTS)
        for call in calls_for(settings):
            session.send({"now": call.name})
            moved = [exchanges[name] for name in call.directions]
            label = Label(
                library="tokenferry",
                call=call.name,
                rows=call.rows,
                tokens=sizes.tokens,
                row_bytes=sizes.row_bytes(call.rows),
                rows_out=sum(exchange.rows for exchange in moved),
                note=group.transport,
            )
            session.report(label, session.time(_steps(group, call, ready, moved)))


def _steps(group: ExpertGroup, call: Call, ready: list[Checked], exchanges: list[RowExchange]) -> tuple[Step, Step]:
    """Return the call, and the plain exchanges that move the same bytes."""

    def baseline(i: int) -> None:
        for exchange in exchanges:
            exchange(i)

    return lambda i: call.make(group, ready[i % VARIANTS]), baseline


def _checked(session: Session, group: ExpertGroup, variant: int, pool: Pool) -> Checked:
    """Draw one set of inputs, make every call with it and check every answer. Collective.

    Raises:
        WrongAnswer: a call returned a wrong result.
    """
    sizes = session.settings.sizes(session.settings.tokens[0])
    inputs = draw(sizes, variant, session.rank, session.device.torch_device)
    routing = inputs.routing
    sent = group.dispatch(inputs.x, routing)
    check_rows("dispatch", sizes, variant, session.rank, sent.x)
    check_rows("redispatch", sizes, variant, session.rank, group.redispatch(inputs.x, sent.plan).x)
    y = expert(as_tensor(sent.x), session.rank)
    must_equal("combine", group.combine(y, sent.plan).x, expected_sums(sizes, inputs))
    reference = DecodeReference(sizes, variant, session.rank, pool)
    decode_plan, decode_y = _check_decode(group, inputs, reference, pool)
    if sizes.hidden % FP8_COLUMNS == 0:
        reference.check_dispatch(
            "decode_dispatch, FP8", group.decode_dispatch(inputs.x, routing, quantize=Scale.FLOAT32)
        )
    return Checked(inputs.x, routing, sent.plan, y, decode_plan, decode_y)


def _check_decode(
    group: ExpertGroup, inputs: Inputs, reference: DecodeReference, pool: Pool
) -> tuple[DecodePlan, Tensor]:
    """Check the decode calls; return plan and answers."""
    sent = group.decode_dispatch(inputs.x, inputs.routing)
    reference.check_dispatch("decode_dispatch", sent)
    y = torch.empty_like(as_tensor(sent.x))  # rows past the counts stay undefined: they must not be read
    for e, count in enumerate(sent.expert_counts.tolist()):
        expert = torch.tensor(reference.first + e, dtype=torch.int64, device="cpu")
        y[e, :count] = pool.rows(expert, torch.arange(count, dtype=torch.int64, device="cpu"), 0)
    for numerics in ("exact", "fast"):
        sums = group.decode_combine(y, sent.plan, numerics=numerics).x
        reference.check_sums(f"decode_combine, {numerics}", sums, numerics=numerics, shift=0)
    return sent.plan, y
