"""The decode calls, for every T: as CUDA graphs and eagerly, isolated and back to back, with hooks and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.bench.core.checks import WrongAnswer
from tokenferry.bench.core.device import no_collections
from tokenferry.bench.core.inputs import FP8_COLUMNS, Sizes
from tokenferry.bench.core.session import Session, Step, expert_group
from tokenferry.bench.suites.decode_reference import DecodeReference, Pool
from tokenferry.bench.suites.host_time import host_time
from tokenferry.types import (
    DecodeCombined,
    DecodeDispatched,
    DecodePlan,
    EncodingName,
    Numerics,
    Quantized,
    Routing,
    Scale,
)

NODES = 100
"""Kernels in the graph that measures the cost of a node."""

FEW_TOKENS = 64
"""Up to this T a call is so short that graphs are made of more of them."""

HOST_BATCHES = 3
HEAP_FOR = 4
"""The group's heap is that of so many times M tokens: it has to hold the data under way in decode calls."""

PADDED = 2
"""The set of inputs in which ranks bring fewer tokens."""


@dataclass(frozen=True, slots=True)
class DataSet:
    """Data for static inputs: a set of inputs, and a set of the pool's rows."""

    variant: int
    shift: int


SETS = (DataSet(1, 1), DataSet(PADDED, 2), DataSet(0, 0))
"""The last one is timed."""


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """One call, or a dispatch with its combine.

    Attributes:
        call: ``"dispatch"``, ``"combine"`` or ``"pair"``.
        fp8: Whether dispatch casts its rows.
        numerics: Numerics of combine.
        encoding: Encoding of combine.
        hooks: Whether it is measured with hooks as well: sent, and received right away.
    """

    call: str
    fp8: bool = True
    numerics: Numerics = "exact"
    encoding: EncodingName = "same"
    hooks: bool = True

    @property
    def name(self) -> str:
        """The call and its options, for people."""
        encoding = "" if self.encoding == "same" else f", encoding {self.encoding}"
        if self.call == "dispatch":
            return "dispatch FP8" if self.fp8 else "dispatch BF16"
        return f"{self.call} {self.numerics}{encoding}"

    def messages(self, hidden: int) -> list[tuple[str, int]]:
        """Return, for each call, which of `DecodeReference.rows_out` it sends, and the bytes of a row with scales."""
        bf16 = 2 * hidden
        encoded = {"same": bf16, "fp8": hidden + 4 * hidden // FP8_COLUMNS, "logfmt10": 168 * hidden // FP8_COLUMNS}
        dispatch = [("dispatch", encoded["fp8"] if self.fp8 else bf16)] if self.call != "combine" else []
        combine = [(self.numerics, encoded[self.encoding])] if self.call != "dispatch" else []
        return dispatch + combine


CASES = (
    DecodeCase("dispatch"),
    DecodeCase("dispatch", fp8=False),
    *(DecodeCase("combine", numerics=numerics) for numerics in ("exact", "fast")),
    *(
        DecodeCase("combine", numerics=numerics, encoding=encoding, hooks=False)
        for numerics in ("exact", "fast")
        for encoding in ("fp8", "logfmt10")
    ),
    *(DecodeCase("pair", numerics=numerics) for numerics in ("exact", "fast")),
)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The results of one iteration of a case: of dispatch and of combine, as far as it has them."""

    sent: DecodeDispatched[Tensor | Quantized] | None
    done: DecodeCombined | None

    def poison(self) -> None:
        """Overwrite it, so that a replay that writes nothing is noticed."""
        if self.sent is not None:
            rows = self.sent.x
            if isinstance(rows, Quantized):
                rows.data.view(torch.uint8).fill_(0x7F)
                rows.scale.fill_(torch.nan)
            else:
                rows.fill_(torch.nan)
            self.sent.expert_counts.fill_(-1)
            self.sent.plan.src_token.fill_(-1)
        if self.done is not None:
            self.done.x.fill_(torch.nan)


class StaticInputs:
    """Tensors that calls, and graphs of them, read at fixed addresses, and the data written there.

    Args:
        group: As a view of the shape that is measured.
        references: Sets of inputs.
        pool: The answers of experts.
        y: ``[L, R*M, H]`` bfloat16, to hold these answers.
    """

    def __init__(self, group: ExpertGroup, references: Sequence[DecodeReference], pool: Pool, y: Tensor) -> None:
        self.group, self.references, self.y = group, references, y
        self._pool, self._now = pool, SETS[-1]
        first = references[0]
        self.x = first.x.clone()
        self.routing = Routing(first.topk_idx.clone(), first.topk_weights.clone())
        pool.fill(y, first.first, self._now.shift)
        self.plan: DecodePlan = group.decode_dispatch(self.x, self.routing, quantize=Scale.FLOAT32).plan

    def load(self, data: DataSet) -> None:
        """Write a set of inputs, and a set of answers."""
        before, self._now = self._now, data
        reference, weights = self.references[data.variant], self.routing.topk_weights
        assert weights is not None
        if before.variant != data.variant:
            self.x.copy_(reference.x)
            self.routing.topk_idx.copy_(reference.topk_idx)
            weights.copy_(reference.topk_weights)
        if before.shift != data.shift:
            self._pool.fill(self.y, reference.first, data.shift)

    def act(self, case: DecodeCase, *, hook: bool) -> Answer:
        """Make the calls of a case. Collective."""
        sent, done, plan = None, None, self.plan
        if case.call != "combine":
            cast = Scale.FLOAT32 if case.fp8 else None
            sent = self.group.decode_dispatch(self.x, self.routing, quantize=cast, return_hook=hook)
            if hook:
                sent.hook()
            plan = sent.plan
        if case.call != "dispatch":
            done = self.group.decode_combine(
                self.y, plan, numerics=case.numerics, encoding=case.encoding, return_hook=hook
            )
            if hook:
                done.hook()
        return Answer(sent, done)

    def errors_of(self, what: str, case: DecodeCase, answer: Answer) -> list[str]:
        """Return what is wrong with the results of the data loaded last; raises nothing, so that ranks stay in step."""
        reference, errors = self.references[self._now.variant], []
        try:
            if answer.sent is not None:
                reference.check_dispatch(f"{what}: dispatch", answer.sent)
            if answer.done is not None:
                reference.check_sums(
                    f"{what}: combine",
                    answer.done.x,
                    numerics=case.numerics,
                    encoding=case.encoding,
                    shift=self._now.shift,
                )
        except WrongAnswer as error:
            errors.append(f"{error} (inputs {self._now.variant})")
        return errors


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """Iterations of a case in one CUDA graph, and the results of the last of them."""

    replay: Callable[[], None]
    last: list[Answer]

    def run(self, inputs: StaticInputs) -> list[Answer]:
        """Replay it once over poisoned results, which it returns; waits. Collective.

        Raises:
            TokenferryError: as the calls.
        """
        for answer in self.last:
            answer.poison()
        self.replay()
        inputs.group.synchronize()
        return self.last


def capture(session: Session, iteration: Callable[[], list[Answer]], count: int) -> Graph:
    """Capture so many iterations as one graph."""
    last: list[Answer] = []

    def work() -> None:
        last.clear()
        for _ in range(count):
            last[:] = iteration()

    return Graph(session.device.capture(work), last)


def measure_decode(session: Session) -> None:
    """Measure the decode calls for every T."""
    session.attempt("decode", _measure, session)


def _measure(session: Session) -> None:
    settings, device = session.settings, session.device.torch_device
    sizes = settings.sizes(max(settings.decode_tokens))
    with expert_group(session, sizes.tokens, heap_for=HEAP_FOR) as group:
        pool = Pool(sizes, device)
        y = new_answers(group)
        with no_collections():
            node_us = _graph_node(session)
        session.send({"graph node": {"us": node_us}})
        for tokens in settings.decode_tokens:
            sizes = settings.sizes(tokens)
            bench = session.attempt(f"decode, T={tokens}", _Tokens, session, group, sizes, pool, y)
            if bench is None:
                continue
            with no_collections():
                for case in CASES:
                    bench.measure(case)


def new_answers(group: ExpertGroup) -> Tensor:
    """``[L, R*M, H]`` bfloat16, undefined."""
    shape = group.shape
    places = group.num_ranks * shape.max_tokens
    return torch.empty(group.num_local_experts, places, shape.hidden, dtype=torch.bfloat16, device=group.device)


def calls_in_a_graph(session: Session, case: DecodeCase, tokens: int) -> int:
    """Return enough calls that the gap between two graphs does not count; the CPU has no graphs."""
    if session.settings.backend == "cpu":
        return 2
    return (20 if tokens <= FEW_TOKENS else 10) // len(case.messages(FP8_COLUMNS))


def _graph_node(session: Session) -> float:
    """Measure the microseconds of a kernel that does next to nothing, in a graph of such kernels."""
    one = torch.zeros(1, device=session.device.torch_device, dtype=torch.float32)

    def work() -> None:
        for _ in range(NODES):
            one.add_(1)

    return session.summary(session.replayed(session.device.capture(work), NODES)).median_us


class _Tokens:
    """All cases of one T."""

    def __init__(self, session: Session, group: ExpertGroup, sizes: Sizes, pool: Pool, y: Tensor) -> None:
        references = [
            DecodeReference(sizes, variant, session.rank, pool, padded=variant == PADDED)
            for variant in range(len(SETS))
        ]
        self._session, self._sizes, self._group = session, sizes, group
        self._inputs = StaticInputs(group, references, pool, y)
        self._rows_out: list[dict[str, int]] = session.gather(references[0].rows_out())

    def measure(self, case: DecodeCase) -> None:
        """Check, time, check again, report. Collective."""
        session, what = self._session, f"decode: {case.name}, T={self._sizes.tokens}"
        graphs = session.attempt(what, self._checked, case)
        if graphs is None:
            return
        item = session.attempt(what, self._timed, case, graphs)
        if item is None or session.attempt(what, self._again, case, graphs) is None:
            return
        session.send({"decode": {**self._label(case), **item}})

    def _checked(self, case: DecodeCase) -> dict[bool, Graph]:
        """Return graphs, without hooks and with, after all results of theirs and of eager calls have been checked."""
        self._inputs.load(SETS[-1])
        graphs = {hook: self._capture(case, hook=hook) for hook in ((False, True) if case.hooks else (False,))}
        errors = []
        for hook in graphs:
            answer = self._inputs.act(case, hook=hook)
            self._group.synchronize()
            errors += self._inputs.errors_of("eager", case, answer)
        _refuse(errors + self._replayed(case, graphs, SETS))
        return graphs

    def _capture(self, case: DecodeCase, *, hook: bool) -> Graph:
        calls = calls_in_a_graph(self._session, case, self._sizes.tokens)
        return capture(self._session, lambda: [self._inputs.act(case, hook=hook)], calls)

    def _again(self, case: DecodeCase, graphs: dict[bool, Graph]) -> bool:
        """Check that replays are still right."""
        _refuse(self._replayed(case, graphs, SETS[:1]))
        return True

    def _replayed(self, case: DecodeCase, graphs: dict[bool, Graph], sets: Sequence[DataSet]) -> list[str]:
        """Overwrite the static inputs and replay; return what is wrong."""
        errors = []
        for data in sets:
            # A plan is of its routing: a combine alone gets other rows only.
            self._inputs.load(replace(data, variant=0) if case.call == "combine" else data)
            for hook, graph in graphs.items():
                what = "graph, hook" if hook else "graph"
                errors += self._inputs.errors_of(what, case, graph.run(self._inputs)[-1])
        self._inputs.load(SETS[-1])
        return errors

    def _timed(self, case: DecodeCase, graphs: dict[bool, Graph]) -> dict[str, object]:
        session = self._session
        item: dict[str, object] = {}
        for hook, suffix in ((False, ""), (True, "_hook")):
            if hook not in graphs:
                item.update(graph_hook=None, eager_hook=None, host_hook_us=None)
                continue
            calls = calls_in_a_graph(session, case, self._sizes.tokens)
            act = partial(self._inputs.act, case, hook=hook)
            item[f"graph{suffix}"] = asdict(session.summary(session.replayed(graphs[hook].replay, calls)))
            item[f"eager{suffix}"] = asdict(session.summary(session.back_to_back([without_index(act)])[0]))
            item[f"host{suffix}_us"] = max(session.gather(host_time(session, act, HOST_BATCHES)["median_us"]))
        [(isolated, late)] = session.isolated([lambda i: self._inputs.act(case, hook=False)])
        item["isolated"] = asdict(session.summary(isolated))
        item["ahead"] = session.ahead(late)
        return item

    def _label(self, case: DecodeCase) -> dict[str, object]:
        messages = []
        for which, row_bytes in case.messages(self._sizes.hidden):
            rows = [one[which] for one in self._rows_out]
            messages.append({"row_bytes": row_bytes, "rows": sum(rows) / len(rows), "rows_most": max(rows)})
        return {
            "call": case.name,
            "tokens": self._sizes.tokens,
            "max_tokens": self._group.shape.max_tokens,
            "messages": messages,
        }


def without_index(act: Callable[[], object]) -> Step:
    """Return a step that has the same inputs in every iteration: those of the graphs."""
    return lambda i: act()


def _refuse(errors: list[str]) -> None:
    """Raise what is wrong, after all collectives have been made, so that ranks stay in step."""
    if errors:
        raise WrongAnswer("; ".join(errors[:3]))
