"""The eager calls of a program, as each library makes them: the native API, DeepEP's `Buffer`, all_to_all_single."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.bench.baselines.nccl import NcclBaseline, NcclPlan, check_sums
from tokenferry.bench.core.checks import WrongAnswer, as_tensor, check_rows, expected_sums, must_equal
from tokenferry.bench.core.inputs import Inputs, Sizes, draw, expert, sent_to
from tokenferry.bench.core.session import Session, Step
from tokenferry.bench.suites.calls import num_variants
from tokenferry.bench.suites.decode_reference import DecodeReference
from tokenferry.types import Plan, Quantized, Routing, Scale

Result = TypeVar("Result")

DECODE_PAIR = "decode pair"
PAIR = "dispatch + combine"
ASYNCHRONOUS = "dispatch + combine, async_finish"
USER_ROWS = "combine, rows in user memory"


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call, or a dispatch with its combine.

    Attributes:
        name: Its name, the same for each library.
        rows: ``"fp8"`` or ``"bf16"``.
        prepare: Checks its results for every set of inputs, and returns it as a step. Collective.
    """

    name: str
    rows: str
    prepare: Callable[[], Step]


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """One set of inputs and the results of a first dispatch.

    Attributes:
        inputs: Inputs of this rank.
        plan: What the library keeps of a dispatch: `Plan`, DeepEP's handle or `NcclPlan`.
        y: ``[N, H]`` bfloat16: this rank's answers, in ordinary memory.
    """

    inputs: Inputs
    plan: Any
    y: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """The results of a decode pair: those of dispatch, in the form of the API, and the sums of combine."""

    sent: Any
    sums: Tensor


class Sets:
    """The sets of inputs of one T, and the checks of what calls return for them."""

    def __init__(self, session: Session, sizes: Sizes) -> None:
        self.session, self.sizes = session, sizes
        device, variants = session.device.torch_device, num_variants(sizes.tokens)
        self.inputs = [draw(sizes, variant, session.rank, device) for variant in range(variants)]

    def ready(self, dispatch: Callable[[Inputs], tuple[Tensor, Any]]) -> list[Ready]:
        """Dispatch every set; return it with its plan and this rank's answers. Collective."""
        found = []
        for inputs in self.inputs:
            x, plan = dispatch(inputs)
            found.append(Ready(inputs, plan, expert(x, self.session.rank)))
        return found

    def dispatch_step(self, what: str, call: Callable[[int], Tensor | Quantized]) -> Step:
        """Check the rows that ``call(variant)`` returns, every bit, and return it as a step. Collective."""
        rank = self.session.rank
        return checked_step(len(self.inputs), call, lambda v, got: check_rows(what, self.sizes, v, rank, got))

    def combine_step(self, what: str, call: Callable[[int], Tensor]) -> Step:
        """Check the sums that ``call(variant)`` returns of `Ready.y`, and return it as a step. Collective."""

        def check(v: int, got: Tensor) -> None:
            must_equal(what, got, expected_sums(self.sizes, self.inputs[v]))

        return checked_step(len(self.inputs), call, check)

    def pair_step(self, what: str, call: Callable[[int], Tensor]) -> Step:
        """Do the same for a pair whose rows come back as they went: once for each rank that had them. Collective."""

        def check(v: int, got: Tensor) -> None:
            inputs = self.inputs[v]
            copies = sent_to(self.sizes, inputs.topk_idx).sum(1, keepdim=True)
            must_equal(what, got, (inputs.x.float() * copies).bfloat16())

        return checked_step(len(self.inputs), call, check)


def checked_step(count: int, call: Callable[[int], Result], check: Callable[[int, Result], None]) -> Step:
    """Make a call for each of ``count`` sets of inputs, check what it returns, and return it as a step. Collective.

    Raises:
        WrongAnswer: a check failed; raised after all calls, so that ranks stay in step.
    """
    errors = []
    for variant in range(count):
        result = call(variant)
        try:
            check(variant, result)
        except WrongAnswer as error:
            errors.append(str(error))
    if errors:
        raise WrongAnswer("; ".join(errors))
    return lambda i: call(i % count)


def native_calls(sets: Sets, group: ExpertGroup) -> Iterator[Call]:
    """Make the calls of the native API; counts on the host. Collective."""

    def dispatch(inputs: Inputs) -> tuple[Tensor, Plan]:
        sent = group.dispatch(inputs.x, inputs.routing)
        return as_tensor(sent.x), sent.plan

    def rows_of(v: int, rows: str) -> Tensor | Quantized:
        return ready[v].inputs.quantized if rows == "fp8" else ready[v].inputs.x

    def whole(v: int, rows: str) -> Tensor | Quantized:
        return group.dispatch(rows_of(v, rows), routings[v]).x

    def kept(v: int, rows: str) -> Tensor | Quantized:
        return group.redispatch(rows_of(v, rows), ready[v].plan).x

    def pair(v: int) -> Tensor:
        sent = group.dispatch(ready[v].inputs.x, routings[v])
        return group.combine(as_tensor(sent.x), sent.plan).x

    ready = sets.ready(dispatch)
    routings = [one.inputs.routing for one in ready]
    heap = [group.empty_rows(one.plan) for one in ready]
    for rows, one in zip(heap, ready, strict=True):
        rows.copy_(one.y)
    yield from dispatches(sets, whole, kept)
    yield Call(
        "combine, rows in the group's memory",
        "bf16",
        lambda: sets.combine_step("combine", lambda v: group.combine(heap[v], ready[v].plan).x),
    )
    yield Call(
        USER_ROWS,
        "bf16",
        lambda: sets.combine_step("combine", lambda v: group.combine(ready[v].y, ready[v].plan).x),
    )
    yield Call(PAIR, "bf16", lambda: sets.pair_step(PAIR, pair))


def baseline_calls(sets: Sets, baseline: NcclBaseline) -> Iterator[Call]:
    """Make the same with all_to_all_single and what it needs around it. Collective."""

    def rows_of(v: int, rows: str) -> Tensor | Quantized:
        return sets.inputs[v].quantized if rows == "fp8" else sets.inputs[v].x

    def whole(v: int, rows: str) -> Tensor | Quantized:
        return baseline.dispatch(sets.inputs[v], rows_of(v, rows))

    def kept(v: int, rows: str) -> Tensor | Quantized:
        return baseline.redispatch(ready[v].plan, rows_of(v, rows))

    def combine() -> Step:
        return _summed(USER_ROWS, sets, lambda v: baseline.combine(ready[v].plan, ready[v].y))

    def pair() -> Step:
        return _summed(PAIR, sets, lambda v: baseline.pair(sets.inputs[v], sets.inputs[v].x, ready[v].y))

    ready = _baseline_ready(sets, baseline)
    yield from dispatches(sets, whole, kept)
    yield Call(USER_ROWS, "bf16", combine)
    yield Call(PAIR, "bf16", pair)


def baseline_decode(sets: Sets, baseline: NcclBaseline) -> Iterator[Call]:
    """Make a pair for few tokens: rows that are FP8 already there, one BF16 row of each rank back. Collective."""
    ready = _baseline_ready(sets, baseline)

    def pair() -> Step:
        inputs = sets.inputs
        return _summed(DECODE_PAIR, sets, lambda v: baseline.pair(inputs[v], inputs[v].quantized, ready[v].y))

    yield Call(DECODE_PAIR, "fp8", pair)


def native_decode(references: list[DecodeReference], group: ExpertGroup, y: Tensor) -> Iterator[Call]:
    """Make the decode pair of the native API: rows cast to FP8 on the way there, exact sums of BF16 rows."""
    routings = [Routing(one.topk_idx, one.topk_weights) for one in references]

    def pair(v: int) -> Pair:
        sent = group.decode_dispatch(references[v].x, routings[v], quantize=Scale.FLOAT32)
        return Pair(sent, group.decode_combine(y, sent.plan).x)

    def check(v: int, got: Pair) -> None:
        references[v].check_dispatch("decode_dispatch", got.sent)
        references[v].check_sums("decode_combine", got.sums, numerics="exact", shift=0)

    yield Call(DECODE_PAIR, "fp8", lambda: checked_step(len(references), pair, check))


def dispatches(
    sets: Sets,
    whole: Callable[[int, str], Tensor | Quantized],
    kept: Callable[[int, str], Tensor | Quantized],
) -> Iterator[Call]:
    """Make the dispatches of a library: plan made and kept, of BF16 and of FP8 rows."""
    for name, call in (("dispatch", whole), ("dispatch, plan kept", kept)):
        for rows in ("bf16", "fp8"):

            def prepare(name: str = name, rows: str = rows, call: Callable[..., Any] = call) -> Step:
                return sets.dispatch_step(name, lambda v: call(v, rows))

            yield Call(name, rows, prepare)


def _baseline_ready(sets: Sets, baseline: NcclBaseline) -> list[Ready]:
    def dispatch(inputs: Inputs) -> tuple[Tensor, NcclPlan]:
        plan = baseline.plan(inputs.topk_idx)
        return baseline.move(plan, inputs.x), plan

    return sets.ready(dispatch)


def _summed(what: str, sets: Sets, call: Callable[[int], Tensor]) -> Step:
    """Check the sums that the baseline returns, within rounding, and return the call as a step. Collective."""

    def check(v: int, got: Tensor) -> None:
        check_sums(f"all_to_all_single: {what}", sets.sizes, sets.inputs[v], got)

    return checked_step(len(sets.inputs), call, check)
