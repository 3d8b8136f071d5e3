"""Sets of inputs: a call is checked with all of them before it is timed, and takes them in turns while it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from tokenferry.bench.core.checks import WrongAnswer, check_by_expert, check_rows, expected_sums, must_equal
from tokenferry.bench.core.inputs import Inputs, Sizes, draw, expert, sent_to
from tokenferry.bench.core.session import Session, Step
from tokenferry.types import Quantized, Routing

Result = TypeVar("Result")

MANY_TOKENS = 4096

PAIR, DECODE_PAIR = "dispatch + combine", "decode pair"
USER_ROWS = "combine, rows in user memory"
"""Names of calls that several libraries have."""


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
        routing: Their routing.
        plan: What the library keeps of a dispatch: `Plan`, DeepEP's handle or `NcclPlan`.
        y: ``[N, H]`` bfloat16: this rank's answers, in ordinary memory.
    """

    inputs: Inputs
    routing: Routing
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

    def rows(self, v: int, kind: str) -> Tensor | Quantized:
        """Return the rows of a set, ``"fp8"`` or ``"bf16"``."""
        return self.inputs[v].quantized if kind == "fp8" else self.inputs[v].x

    def ready(self, dispatch: Callable[[Inputs], tuple[Tensor, Any]]) -> list[Ready]:
        """Dispatch every set, check its rows; return it with its plan and this rank's answers. Collective."""
        found = []

        def call(v: int) -> Tensor:
            inputs = self.inputs[v]
            x, plan = dispatch(inputs)
            found.append(Ready(inputs, inputs.routing, plan, expert(x, self.session.rank)))
            return x

        self.dispatch_step("dispatch", call)
        return found

    def dispatches(
        self, whole: Callable[[int, str], Tensor | Quantized], kept: Callable[[int, str], Tensor | Quantized]
    ) -> Iterator[Call]:
        """Make the dispatches of a library: plan made and kept, of BF16 and of FP8 rows."""
        for name, call in (("dispatch", whole), ("dispatch, plan kept", kept)):
            for kind in ("bf16", "fp8"):

                def one(
                    v: int, call: Callable[[int, str], Tensor | Quantized] = call, kind: str = kind
                ) -> Tensor | Quantized:
                    return call(v, kind)

                yield Call(name, kind, partial(self.dispatch_step, name, one))

    def dispatch_step(self, what: str, call: Callable[[int], Tensor | Quantized]) -> Step:
        """Check the rows that ``call(v)`` returns, every bit, and return it as a step. Collective."""
        rank = self.session.rank
        return self.step(call, lambda v, got: check_rows(what, self.sizes, v, rank, got))

    def expert_step(self, what: str, call: Callable[[int], Result], groups: Callable[[Result], list[Tensor]]) -> Step:
        """Do the same where ``groups`` finds the rows of each local expert in what ``call(v)`` returns. Collective."""
        rank = self.session.rank
        return self.step(call, lambda v, got: check_by_expert(what, self.sizes, v, rank, groups(got)))

    def combine_step(self, what: str, call: Callable[[int], Tensor], count: int | None = None) -> Step:
        """Check the sums that ``call(v)`` returns of `Ready.y`, and return it as a step. Collective.

        Args:
            what: The call, for the message.
            call: The call.
            count: The number of sets that it takes: the first ones; None: all.
        """

        def check(v: int, got: Tensor) -> None:
            must_equal(what, got, expected_sums(self.sizes, self.inputs[v]))

        return checked_step(count or len(self.inputs), call, check)

    def pair_step(self, what: str, call: Callable[[int], Tensor]) -> Step:
        """Do the same for a pair whose rows come back as they went: once for each rank that had them. Collective."""

        def check(v: int, got: Tensor) -> None:
            inputs = self.inputs[v]
            copies = sent_to(self.sizes, inputs.topk_idx).sum(1, keepdim=True)
            must_equal(what, got, (inputs.x.float() * copies).bfloat16())

        return self.step(call, check)

    def step(self, call: Callable[[int], Result], check: Callable[[int, Result], None]) -> Step:
        """Check what ``call(v)`` returns for every set, and return it as a step. Collective; see `checked_step`."""
        return checked_step(len(self.inputs), call, check)


def num_variants(tokens: int) -> int:
    """Return the number of sets of inputs in rotation: fewer where they are far larger than any cache."""
    return 3 if tokens < MANY_TOKENS else 2


def checked_step(count: int, call: Callable[[int], Result], check: Callable[[int, Result], None]) -> Step:
    """Make a call for each of ``count`` sets of inputs, check what it returns, and return it as a step. Collective.

    Raises:
        WrongAnswer: a check failed; raised after all calls, so that ranks stay in step.
    """
    errors = []
    for v in range(count):
        try:
            check(v, call(v))
        except WrongAnswer as error:
            errors.append(str(error))
    if errors:
        raise WrongAnswer("; ".join(errors))
    return lambda i: call(i % count)
