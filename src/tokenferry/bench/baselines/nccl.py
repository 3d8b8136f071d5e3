"""The baseline that every torch has: all_to_all_single, with the index work around it as torch users write it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.bench.core.checks import expected_sums, must_be_near
from tokenferry.bench.core.inputs import Inputs, Sizes, remote_rows, sent_to
from tokenferry.bench.core.session import Label, Session, Step, baseline_group
from tokenferry.bench.core.sets import DECODE_PAIR, PAIR, USER_ROWS, Call, Ready, Sets
from tokenferry.types import Quantized

NAME = "nccl"
DESCRIPTION = "all_to_all_single over NCCL, one row per token and rank, with gather before and index_add after"


@dataclass(frozen=True, slots=True, eq=False)
class NcclPlan:
    """The plan of a dispatch: the ranks and tokens of its rows.

    Attributes:
        tokens: ``[rows sent]`` int64: the token of each row that leaves, by rank, then token.
        send: Rows to each rank.
        receive: Rows from each rank.
    """

    tokens: Tensor
    send: list[int]
    receive: list[int]


class NcclBaseline:
    """Dispatch and combine of one rank over a process group that carries the device's tensors."""

    def __init__(self, pg: dist.ProcessGroup, sizes: Sizes) -> None:
        self._pg, self._sizes = pg, sizes
        self.name = NAME if pg.name() == "nccl" else pg.name()

    def plan(self, topk_idx: Tensor) -> NcclPlan:
        """Exchange the counts; waits for them, as the splits have to be known on the host. Collective."""
        chosen = sent_to(self._sizes, topk_idx).t()
        counts = chosen.sum(1)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self._pg)
        send, receive = torch.stack([counts, received]).tolist()
        return NcclPlan(chosen.nonzero()[:, 1], send, receive)

    def move(self, plan: NcclPlan, rows: Tensor) -> Tensor:
        """Send ``rows[token]`` to the ranks of each token. Collective."""
        return self._exchange(rows.view(torch.uint8)[plan.tokens], plan.send, plan.receive).view(rows.dtype)

    def redispatch(self, plan: NcclPlan, x: Tensor | Quantized) -> Tensor | Quantized:
        """Send rows, with their scales if they have any. Collective."""
        if isinstance(x, Tensor):
            return self.move(plan, x)
        return Quantized(self.move(plan, x.data), self.move(plan, x.scale))

    def dispatch(self, inputs: Inputs, x: Tensor | Quantized) -> Tensor | Quantized:
        """Make the plan and send rows, ids and weights. Collective."""
        return self._send(self.plan(inputs.topk_idx), inputs, x)

    def pair(self, inputs: Inputs, x: Tensor | Quantized, y: Tensor) -> Tensor:
        """Dispatch ``x``, then combine the answers ``y``, which are ready. Collective."""
        plan = self.plan(inputs.topk_idx)
        self._send(plan, inputs, x)
        return self.combine(plan, y)

    def combine(self, plan: NcclPlan, y: Tensor) -> Tensor:
        """Send every row home and add up in float32; rounds once."""
        rows = self._exchange(y.view(torch.uint8), plan.receive, plan.send).view(y.dtype)
        total = torch.zeros(self._sizes.tokens, y.shape[1], dtype=torch.float32, device=y.device)
        return total.index_add_(0, plan.tokens, rows.float()).to(y.dtype)

    def _send(self, plan: NcclPlan, inputs: Inputs, x: Tensor | Quantized) -> Tensor | Quantized:
        received = self.redispatch(plan, x)
        self.move(plan, torch.cat([inputs.topk_idx.int().view(torch.float32), inputs.topk_weights], 1))
        return received

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        arrived = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows, receive, send, group=self._pg)
        return arrived


def baseline_calls(sets: Sets, baseline: NcclBaseline) -> Iterator[Call]:
    """Make the calls of a program, with what all_to_all_single needs around it. Collective."""

    def whole(v: int, rows: str) -> Tensor | Quantized:
        return baseline.dispatch(sets.inputs[v], sets.rows(v, rows))

    def kept(v: int, rows: str) -> Tensor | Quantized:
        return baseline.redispatch(ready[v].plan, sets.rows(v, rows))

    ready = _ready(sets, baseline)
    yield from sets.dispatches(whole, kept)
    combine = partial(_summed, USER_ROWS, sets, lambda v: baseline.combine(ready[v].plan, ready[v].y))
    yield Call(USER_ROWS, "bf16", combine)
    yield _pair(PAIR, "bf16", sets, baseline, ready)


def baseline_decode(sets: Sets, baseline: NcclBaseline) -> Iterator[Call]:
    """Make a pair for few tokens: rows that are FP8 already there, one BF16 row of each rank back. Collective."""
    yield _pair(DECODE_PAIR, "fp8", sets, baseline, _ready(sets, baseline))


def _ready(sets: Sets, baseline: NcclBaseline) -> list[Ready]:
    def dispatch(inputs: Inputs) -> tuple[Tensor, NcclPlan]:
        plan = baseline.plan(inputs.topk_idx)
        return baseline.move(plan, inputs.x), plan

    return sets.ready(dispatch)


def _pair(name: str, kind: str, sets: Sets, baseline: NcclBaseline, ready: list[Ready]) -> Call:
    def pair(v: int) -> Tensor:
        return baseline.pair(sets.inputs[v], sets.rows(v, kind), ready[v].y)

    return Call(name, kind, partial(_summed, name, sets, pair))


def _summed(what: str, sets: Sets, call: Callable[[int], Tensor]) -> Step:
    """Check the sums that the baseline returns, within rounding, and return the call as a step. Collective."""

    def check(v: int, got: Tensor) -> None:
        check_sums(f"all_to_all_single: {what}", sets.sizes, sets.inputs[v], got)

    return sets.step(call, check)


def check_sums(what: str, sizes: Sizes, inputs: Inputs, got: Tensor) -> None:
    """Check sums that were added in another order in float32, then rounded once: a unit in the last place apart.

    Raises:
        WrongAnswer: they are further apart.
    """
    expected = expected_sums(sizes, inputs).float()
    magnitude = expected_sums(sizes, replace(inputs, x=inputs.x.abs())).float()
    must_be_near(what, got.float(), expected, relative=2.0**-7, absolute=magnitude * 2.0**-20)


@torch.no_grad()
def measure_nccl(session: Session) -> None:
    """Measure the baseline for every T."""
    own = session.attempt("nccl: making a process group", baseline_group, session)
    if own is None:
        return
    for tokens in session.settings.tokens:
        sizes = session.settings.sizes(tokens)
        _measure(session, NcclBaseline(own, sizes), sizes)
    session.device.synchronize()
    dist.destroy_process_group(own)


def _measure(session: Session, baseline: NcclBaseline, sizes: Sizes) -> None:
    sets = Sets(session, sizes)
    made = session.attempt(f"nccl: plans, T={sizes.tokens}", lambda: list(baseline_calls(sets, baseline)))
    calls: dict[tuple[str, str], Call] = {(call.name, call.rows): call for call in made or ()}
    out, home = remote_rows(sizes, len(sets.inputs), session.rank, session.device.torch_device)
    for name, kind in itertools.product(("dispatch, plan kept", "dispatch", USER_ROWS), ("fp8", "bf16")):
        if (name, kind) not in calls:
            continue
        what, link, rows_out = ("combine", "load", home) if name == USER_ROWS else (name, "store", out)
        row_bytes = sizes.row_bytes(kind)
        label = Label(baseline.name, what, kind, sizes.tokens, sizes.routing, None, link, row_bytes, rows_out)
        session.case(label, calls[name, kind].prepare)
