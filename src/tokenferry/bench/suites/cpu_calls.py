"""What `tokenferry bench` measures: each call, and all_to_all_single of the same bytes in the same group and run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.bench.core import clock
from tokenferry.bench.core import progress as feed
from tokenferry.bench.core.checked import Ready, prepare
from tokenferry.bench.core.inputs import Spec, draw, sent_to
from tokenferry.bench.core.static_inputs import FP8_COLUMNS
from tokenferry.types import MoeShape, Numerics, Scale, TransportName

VARIANTS = 3
"""Sets of inputs that the iterations go through, so that no cache or branch learns one routing."""

CHAINED_WARMUP = 2
"""Calls at the head of each chained run that do not count: the barrier before them lets ranks start apart."""


@dataclass(frozen=True, slots=True)
class Samples:
    """One call on one rank.

    Attributes:
        call: Its name.
        row_bytes: Bytes of rows that this rank sends in it, those to itself included, mean over the sets of inputs.
        ours: Seconds of each iteration, by mode (``"drained"``, ``"chained"``).
        limit: The same of all_to_all_single.
    """

    call: str
    row_bytes: float
    ours: dict[str, list[float]]
    limit: dict[str, list[float]]


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call and the plain exchanges that move the same bytes."""

    name: str
    ours: clock.Step
    limit: clock.Step
    row_bytes: float


class Exchange:
    """all_to_all_single of ready-made rows, one set of splits per variant; buffers exist and were touched beforehand.

    Args:
        pg: The process group.
        counts: ``[VARIANTS, R, R]`` rows from each rank to each rank.
        row_bytes: Bytes of a row.
    """

    def __init__(self, pg: dist.ProcessGroup, counts: Tensor, row_bytes: int) -> None:
        self._pg = pg
        rank = pg.rank()
        self._send = counts[:, rank].tolist()
        self._receive = counts[:, :, rank].tolist()
        self._source = torch.randint(0, 256, (max(map(sum, self._send)), row_bytes), dtype=torch.uint8)
        self._target = torch.zeros(max(map(sum, self._receive)), row_bytes, dtype=torch.uint8)
        self.row_bytes = sum(map(sum, self._send)) * row_bytes / len(self._send)

    def __call__(self, i: int) -> None:
        """Exchange the rows of iteration ``i``. Collective; returns when they are here."""
        send, receive = self._send[i % VARIANTS], self._receive[i % VARIANTS]
        source, target = self._source[: sum(send)], self._target[: sum(receive)]
        dist.all_to_all_single(target, source, receive, send, group=self._pg)


def measure(
    rank: int, pg: dist.ProcessGroup, news: str, spec: Spec, transport: TransportName
) -> tuple[list[Samples], str]:
    """Check, then time every call over one transport; a job of `World` (through `run_with_feed`).

    Returns:
        The samples of this rank, and the transport that the group chose.

    Raises:
        WrongAnswer: a check failed; nothing was timed.
    """

    def tell(text: str) -> None:
        if rank == 0:
            feed.send(news, {"transport": transport, "now": text})

    shape = MoeShape(spec.experts, spec.top_k, spec.hidden, max_tokens=spec.tokens)
    with ExpertGroup(pg, shape, transport=transport) as group, torch.no_grad():
        tell("checking every answer")
        ready = [prepare(group, spec, variant) for variant in range(VARIANTS)]
        samples = []
        for call in _calls(group, pg, spec, ready):
            tell(call.name)
            samples.append(_time(pg, spec, call))
        return samples, group.transport


def num_steps(spec: Spec) -> int:
    """How many times `measure` tells what it does."""
    return 1 + len(_THROUGHPUT) + len(_DECODE) + (spec.hidden % FP8_COLUMNS == 0)


def _time(pg: dist.ProcessGroup, spec: Spec, call: Call) -> Samples:
    steps = (call.ours, call.limit)
    drained = clock.drained(pg, steps, iters=spec.iters, warmup=spec.warmup)
    chained = clock.chained(pg, steps, iters=spec.iters, warmup=CHAINED_WARMUP)
    ours, limit = ({"drained": d, "chained": c} for d, c in zip(drained, chained, strict=True))
    return Samples(call.name, call.row_bytes, ours, limit)


Ours = Callable[[ExpertGroup, Ready], object]


def _pair(group: ExpertGroup, ready: Ready) -> object:
    sent = group.dispatch(ready.inputs.x, ready.routing)
    return group.combine(ready.y, sent.plan)


def _decode_pair(group: ExpertGroup, ready: Ready, numerics: Numerics = "exact") -> object:
    sent = group.decode_dispatch(ready.inputs.x, ready.routing)
    return group.decode_combine(ready.decode_y, sent.plan, numerics=numerics)


# Name, call, and the directions in which its rows travel: "out" and "home" carry one row per token and rank, "answers"
# one per token and expert.
_THROUGHPUT: tuple[tuple[str, Ours, tuple[str, ...]], ...] = (
    ("dispatch + combine", _pair, ("out", "home")),
    ("dispatch", lambda g, r: g.dispatch(r.inputs.x, r.routing), ("out",)),
    ("redispatch (plan kept)", lambda g, r: g.redispatch(r.inputs.x, r.plan), ("out",)),
    ("combine", lambda g, r: g.combine(r.y, r.plan), ("home",)),
)
_DECODE: tuple[tuple[str, Ours, tuple[str, ...]], ...] = (
    ("decode pair, exact", _decode_pair, ("out", "answers")),
    ("decode pair, fast", lambda g, r: _decode_pair(g, r, "fast"), ("out", "home")),
    ("decode dispatch", lambda g, r: g.decode_dispatch(r.inputs.x, r.routing), ("out",)),
    ("decode combine, exact", lambda g, r: g.decode_combine(r.decode_y, r.decode_plan), ("answers",)),
)
_FP8: tuple[str, Ours, tuple[str, ...]] = (
    "decode dispatch, FP8",
    lambda g, r: g.decode_dispatch(r.inputs.x, r.routing, quantize=Scale.FLOAT32),
    ("out fp8",),
)


def _calls(group: ExpertGroup, pg: dist.ProcessGroup, spec: Spec, ready: list[Ready]) -> list[Call]:
    exchanges = _exchanges(pg, spec)
    table = [*_THROUGHPUT, *_DECODE, *([_FP8] if spec.hidden % FP8_COLUMNS == 0 else [])]
    return [_call(group, ready, name, ours, [exchanges[d] for d in directions]) for name, ours, directions in table]


def _call(group: ExpertGroup, ready: list[Ready], name: str, ours: Ours, exchanges: list[Exchange]) -> Call:
    def limit(i: int) -> None:
        for exchange in exchanges:
            exchange(i)

    return Call(name, lambda i: ours(group, ready[i % VARIANTS]), limit, sum(e.row_bytes for e in exchanges))


def _exchanges(pg: dist.ProcessGroup, spec: Spec) -> dict[str, Exchange]:
    rows = torch.zeros(VARIANTS, spec.ranks, spec.ranks, dtype=torch.int64)
    answers = torch.zeros_like(rows)
    experts_per_rank = spec.experts // spec.ranks
    for variant in range(VARIANTS):
        for source in range(spec.ranks):
            inputs = draw(spec, variant, source)
            rows[variant, source] = sent_to(spec, inputs).sum(0)
            owners = (inputs.topk_idx // experts_per_rank).flatten()
            answers[variant, source] = torch.bincount(owners, minlength=spec.ranks)
    bf16 = 2 * spec.hidden
    return {
        "out": Exchange(pg, rows, bf16),
        "home": Exchange(pg, rows.transpose(1, 2), bf16),
        "answers": Exchange(pg, answers.transpose(1, 2), bf16),
        "out fp8": Exchange(pg, rows, spec.hidden + 4 * (spec.hidden // FP8_COLUMNS)),
    }
