"""The decode calls, for every T: as CUDA graphs and eagerly, drained and chained, with hooks and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.bench.core.clock import Step
from tokenferry.bench.core.device import no_collections, slowest
from tokenferry.bench.core.inputs import WrongAnswer
from tokenferry.bench.core.session import Settings, Trial, expert_group, trial
from tokenferry.bench.core.static_inputs import Sizes
from tokenferry.bench.suites.decode_reference import GROUP, Pool, Truth
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
"""Kernels in the graph that tells what a node costs."""

FEW_TOKENS = 64
"""Up to here a call is so short that graphs are made of more of them."""

HOST_BATCHES = 3
ROOM = 4
"""The group's heap is that of so many times M tokens: it has to hold what is under way in decode calls."""

PADDED = 2
"""The set of inputs in which ranks bring fewer tokens."""

SETS = ((1, 1), (PADDED, 2), (0, 0))
"""What static inputs are overwritten with: a set of inputs, and a set of the pool's rows; the last one is timed."""


@dataclass(frozen=True, slots=True)
class Case:
    """One call, or a dispatch with its combine.

    Attributes:
        call: ``"dispatch"``, ``"combine"`` or ``"pair"``.
        fp8: Whether dispatch casts its rows.
        numerics: Of combine.
        encoding: Of combine.
        hooks: Whether it is measured with hooks as well: sent, and received right away.
    """

    call: str
    fp8: bool = True
    numerics: Numerics = "exact"
    encoding: EncodingName = "same"
    hooks: bool = True

    @property
    def name(self) -> str:
        """In words."""
        encoding = "" if self.encoding == "same" else f", encoding {self.encoding}"
        if self.call == "dispatch":
            return "dispatch FP8" if self.fp8 else "dispatch BF16"
        return f"{self.call} {self.numerics}{encoding}"

    def messages(self, hidden: int) -> list[tuple[str, int]]:
        """What travels: which of `Truth.rows_out`, and the bytes of a row with its scales."""
        bf16 = 2 * hidden
        encoded = {"same": bf16, "fp8": hidden + 4 * hidden // GROUP, "logfmt10": 168 * hidden // GROUP}
        dispatch = [("dispatch", encoded["fp8"] if self.fp8 else bf16)] if self.call != "combine" else []
        combine = [(self.numerics, encoded[self.encoding])] if self.call != "dispatch" else []
        return dispatch + combine


CASES = (
    Case("dispatch"),
    Case("dispatch", fp8=False),
    *(Case("combine", numerics=numerics) for numerics in get_args(Numerics)),
    *(
        Case("combine", numerics=numerics, encoding=encoding, hooks=False)
        for numerics in get_args(Numerics)
        for encoding in ("fp8", "logfmt10")
    ),
    *(Case("pair", numerics=numerics) for numerics in get_args(Numerics)),
)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What one round of a case returned: the results of dispatch and of combine, as far as it has them."""

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


class Desk:
    """Tensors that calls, and graphs of them, read at fixed places, and what is written there.

    Args:
        group: As a view of the shape that is measured.
        truths: Sets of inputs.
        pool: What experts answer with.
        y: ``[L, R*M, H]`` bfloat16, to hold these answers.
    """

    def __init__(self, group: ExpertGroup, truths: Sequence[Truth], pool: Pool, y: Tensor) -> None:
        self.group, self.truths, self.y = group, truths, y
        self._pool, self._now = pool, SETS[-1]
        first = truths[0]
        self.x = first.x.clone()
        self.routing = Routing(first.topk_idx.clone(), first.topk_weights.clone())
        pool.fill(y, first.first, self._now[1])
        self.plan: DecodePlan = group.decode_dispatch(self.x, self.routing, quantize=Scale.FLOAT32).plan

    def load(self, variant: int, shift: int) -> None:
        """Write a set of inputs, and a set of answers."""
        before, self._now = self._now, (variant, shift)
        truth, weights = self.truths[variant], self.routing.topk_weights
        assert weights is not None
        if before[0] != variant:
            self.x.copy_(truth.x)
            self.routing.topk_idx.copy_(truth.topk_idx)
            weights.copy_(truth.topk_weights)
        if before[1] != shift:
            self._pool.fill(self.y, truth.first, shift)

    def act(self, case: Case, *, hook: bool) -> Answer:
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

    def complaints(self, what: str, case: Case, answer: Answer) -> list[str]:
        """What is wrong with an answer to what was loaded last. Does not raise: other ranks are in step still."""
        variant, shift = self._now
        truth, said = self.truths[variant], []
        try:
            if answer.sent is not None:
                truth.check_dispatch(f"{what}: dispatch", answer.sent)
            if answer.done is not None:
                truth.check_sums(f"{what}: combine", answer.done.x, (case.numerics, case.encoding, shift))
        except WrongAnswer as error:
            said.append(f"{error} (inputs {variant})")
        return said


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """Rounds of a case in one CUDA graph, and what the last of them returns."""

    replay: Callable[[], None]
    last: list[Answer]

    def run(self, desk: Desk) -> list[Answer]:
        """Replay it once over poisoned results, which it returns; waits. Collective.

        Raises:
            TokenferryError: what the calls met.
        """
        for answer in self.last:
            answer.poison()
        self.replay()
        desk.group.synchronize()
        return self.last


def measure_decode(rank: int, pg: dist.ProcessGroup, news: str, settings: Settings) -> None:
    """Measure the decode calls for every T; a job of `World` (through `run_with_feed`). Results go to the news."""
    with trial(rank, pg, news, settings) as here:
        here.attempt("decode", lambda: _measure(here))


def _measure(here: Trial) -> None:
    settings, device = here.settings, here.bed.device
    sizes = settings.sizes(max(settings.decode_tokens))
    with expert_group(here, sizes.tokens, room=ROOM) as group:
        pool = Pool(sizes, device)
        y = new_answers(group)
        with no_collections():
            node_us = _graph_node(here)
        here.tell({"graph node": {"us": node_us}})
        for tokens in settings.decode_tokens:
            bench = here.attempt(f"decode, T={tokens}", partial(_Tokens, here, group, settings.sizes(tokens), pool, y))
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


def calls_in_a_graph(here: Trial, case: Case, tokens: int) -> int:
    """Enough of them that what is between two graphs does not count; the CPU has none."""
    if here.settings.device == "cpu":
        return 2
    return (20 if tokens <= FEW_TOKENS else 10) // len(case.messages(GROUP))


def _graph_node(here: Trial) -> float:
    """Microseconds that a kernel which does next to nothing takes in a graph of such kernels."""
    one = torch.zeros(1, device=here.bed.device)

    def work() -> None:
        for _ in range(NODES):
            one.add_(1)

    return here.summary(here.replayed(here.bed.capture(work), NODES)).median_us


class _Tokens:
    """All cases of one T."""

    def __init__(self, here: Trial, group: ExpertGroup, sizes: Sizes, pool: Pool, y: Tensor) -> None:
        truths = [Truth(sizes, variant, here.rank, pool, padded=variant == PADDED) for variant in range(len(SETS))]
        self._here, self._sizes, self._group = here, sizes, group
        self._desk = Desk(group, truths, pool, y)
        self._rows_out: list[dict[str, int]] = here.gather(truths[0].rows_out())

    def measure(self, case: Case) -> None:
        """Check, time, check again, tell. Collective."""
        here, what = self._here, f"decode: {case.name}, T={self._sizes.tokens}"
        here.tell({"now": what})
        graphs = here.attempt(what, lambda: self._checked(case))
        if graphs is None:
            return
        item = here.attempt(what, lambda: self._timed(case, graphs))
        if item is None or here.attempt(what, lambda: self._again(case, graphs)) is None:
            return
        here.tell({"decode": {**self._label(case), **item}})

    def _checked(self, case: Case) -> dict[bool, Graph]:
        """Graphs, without hooks and with; everything that they and eager calls return has been checked."""
        self._desk.load(*SETS[-1])
        graphs = {hook: self._capture(case, hook=hook) for hook in ((False, True) if case.hooks else (False,))}
        said = []
        for hook in graphs:
            answer = self._desk.act(case, hook=hook)
            self._group.synchronize()
            said += self._desk.complaints("eager", case, answer)
        _refuse(said + self._replayed(case, graphs, SETS))
        return graphs

    def _capture(self, case: Case, *, hook: bool) -> Graph:
        last: list[Answer] = []

        def work() -> None:
            last.clear()
            for _ in range(calls_in_a_graph(self._here, case, self._sizes.tokens)):
                last[:] = [self._desk.act(case, hook=hook)]

        return Graph(self._here.bed.capture(work), last)

    def _again(self, case: Case, graphs: dict[bool, Graph]) -> bool:
        """Whether replays are right still."""
        _refuse(self._replayed(case, graphs, SETS[:1]))
        return True

    def _replayed(self, case: Case, graphs: dict[bool, Graph], sets: Sequence[tuple[int, int]]) -> list[str]:
        """Overwrite the static inputs, replay, look; what is wrong."""
        said = []
        for variant, shift in sets:
            # A plan is of its routing: a combine alone gets other rows only.
            self._desk.load(0 if case.call == "combine" else variant, shift)
            for hook, graph in graphs.items():
                what = "graph, hook" if hook else "graph"
                said += self._desk.complaints(what, case, graph.run(self._desk)[-1])
        self._desk.load(*SETS[-1])
        return said

    def _timed(self, case: Case, graphs: dict[bool, Graph]) -> dict[str, object]:
        here = self._here
        item: dict[str, object] = {}
        for hook, suffix in ((False, ""), (True, "_hook")):
            if hook not in graphs:
                item.update(graph_hook=None, eager_hook=None, host_hook_us=None)
                continue
            calls = calls_in_a_graph(here, case, self._sizes.tokens)
            act = partial(self._desk.act, case, hook=hook)
            item[f"graph{suffix}"] = asdict(here.summary(here.replayed(graphs[hook].replay, calls)))
            item[f"eager{suffix}"] = asdict(here.summary(here.chained(_ignoring(act))))
            item[f"host{suffix}_us"] = max(here.gather(host_time(here, act, HOST_BATCHES)["median_us"]))
        drained, late = here.drained(lambda i: self._desk.act(case, hook=False))
        item["drained"] = asdict(here.summary(drained))
        item["ahead"] = 1 - sum(slowest(here.pg, late)) / len(late)
        return item

    def _label(self, case: Case) -> dict[str, object]:
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


def _ignoring(act: Callable[[], object]) -> Step:
    """The same inputs in every iteration: those of the graphs."""
    return lambda i: act()


def _refuse(said: list[str]) -> None:
    """Raise what is wrong: when all collectives are made, so that ranks stay in step."""
    if said:
        raise WrongAnswer("; ".join(said[:3]))
