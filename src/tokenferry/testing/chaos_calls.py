"""What the ranks of a chaos soak call, and how each result is checked.

A round is prepared before a step starts, so that most of the step is spent inside of calls. Each call that returned has
the right result, whatever happened to later ones. A rank that is masked has sent nothing, and its experts add nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.testing import soak_large
from tokenferry.testing.cases import answers
from tokenferry.testing.compare import close_each, same_bits
from tokenferry.testing.oracle import Oracle, Sent, fp8_cast, ue8m0
from tokenferry.testing.soak_cases import Combining, Live, draw_case, draw_options, oracle_of
from tokenferry.testing.soak_graphs import Graph, GraphKind
from tokenferry.testing.soak_graphs import draw as draw_inputs
from tokenferry.testing.soak_graphs_reference import AllInputs, Reference
from tokenferry.types import Combined, DecodeDispatched, Dispatched, EncodingName, Numerics, Quantized, Routing, Scale

_ENCODINGS: tuple[EncodingName, ...] = ("same", "same", "fp8", "logfmt10")
_MOST_NUMBERS = 1 << 20
"""The most numbers of a large round: a rank that still checks them is not to be late for its next call."""
_NONE: frozenset[int] = frozenset()


@dataclass(slots=True, eq=False)
class Call:
    """One call of a round.

    Attributes:
        name: Its name in reports.
        run: The call.
        masks: Returns the ranks that its group skips.
        returned: Whether it returned.
        masked: The ranks that were masked when it returned.
        disturbed: Whether a rank was lost to it.
    """

    name: str
    run: Callable[[], object]
    masks: Callable[[], frozenset[int]]
    returned: bool = False
    masked: frozenset[int] = _NONE
    disturbed: bool = False


class Rounds(Protocol):
    """Some calls that belong together, and the check of their results."""

    calls: list[Call]

    def check(self) -> int:
        """Check the results of all calls that returned; return how many that were.

        Raises:
            AssertionError: one is wrong.
        """


class Throughput:
    """dispatch, and in any order redispatch and combine."""

    def __init__(self, group: ExpertGroup, seed: int) -> None:
        pick, rank = random.Random(seed), group.rank
        self._case = case = draw_case(pick, group.num_ranks)
        self._options = draw_options(pick, case)
        self._oracle = oracle_of(case, self._options)
        self._group, self._view, self._rank = group, group.for_shape(case.shape), rank
        mine, device = self._oracle.sent[rank], group.device
        self._weights = None if mine.topk_weights is None else mine.topk_weights.to(device)
        self._topk_idx = mine.topk_idx.to(device)
        self._bytes = self._scales = None
        if pick.random() < 0.25:
            self._bytes = [case.rows(r, torch.float32, 32, 40).to(torch.float8_e4m3fn) for r in range(case.ranks)]
            self._scales = [case.rows(r, torch.float32, 6, 41) for r in range(case.ranks)]
        self._values = [one.x * 2 for one in self._oracle.sent]
        self._x = self._rows([one.x for one in self._oracle.sent])
        self._again = self._values[rank].to(device)
        self._combine_seed = pick.randrange(1 << 30)
        self._sent: Dispatched[Tensor | Quantized] | None = None
        self._sent_again: Dispatched[Tensor | Quantized] | None = None
        self._combining: Combining | None = None
        self._home: Combined | None = None
        call = partial(_call, group)
        more = [call("redispatch", self._redispatch), call("combine", self._combine)]
        pick.shuffle(more)
        self.calls = [call("dispatch", self._dispatch), *more[: pick.randint(1, 2)]]

    def check(self) -> int:
        """See `Rounds.check`."""
        checks = 0
        if self._sent is None:
            return checks
        live = self._live()
        for one in live.compared(self._rank):
            same_bits(one.what, one.got, one.want)
            checks += 1
        if self._bytes is not None and self._scales is not None:
            checks += self._check_quantized(live, self._bytes, self._scales)
        if self._sent_again is not None:
            assert isinstance(self._sent_again.x, Tensor)
            rows = self._sent_again.x.reshape(-1, self._case.hidden)[live.places(self._rank)]
            same_bits(f"{live.what} redispatch", rows, self._oracle.x(self._rank, self._values))
            checks += 1
        if self._home is not None and self._combining is not None:
            for one in self._combining.compared(self._home):
                same_bits(one.what, one.got, one.want)
                checks += 1
        return checks

    def _check_quantized(self, live: Live, data: Sequence[Tensor], scales: Sequence[Tensor]) -> int:
        assert isinstance(live.sent.x, Quantized)
        places = live.places(self._rank)
        rows = live.sent.x.data.reshape(-1, 32).view(torch.uint8)[places]
        want = self._oracle.x(self._rank, [one.view(torch.uint8) for one in data])
        same_bits(f"{live.what} data", rows, want)
        same_bits(f"{live.what} scale", live.sent.x.scale.reshape(-1, 6)[places], self._oracle.x(self._rank, scales))
        return 2

    def _rows(self, rows: Sequence[Tensor]) -> Tensor | Quantized:
        device = self._group.device
        if self._bytes is None or self._scales is None:
            return rows[self._rank].to(device)
        return Quantized(self._bytes[self._rank].to(device), self._scales[self._rank].to(device))

    def _live(self) -> Live:
        assert self._sent is not None
        what = f"rank {self._rank}, {self._case}, {self._options}"
        return Live(what, self._case, self._options, self._oracle, self._sent)

    def _dispatch(self) -> None:
        routing = Routing(self._topk_idx, self._weights)
        if isinstance(self._x, Quantized):
            self._sent = self._view.dispatch(self._x, routing, options=self._options)
        else:
            self._sent = self._view.dispatch(self._x, routing, options=self._options)

    def _redispatch(self) -> None:
        self._sent_again = self._view.redispatch(self._again, self._live().sent.plan)

    def _combine(self) -> None:
        self._combining = Combining(random.Random(self._combine_seed), self._live(), self._rank)
        self._home = self._combining.call(self._group)


class Decode:
    """decode_dispatch and decode_combine, with or without hooks; also after ranks were masked."""

    def __init__(self, group: ExpertGroup, seed: int) -> None:
        pick = random.Random(seed)
        case = draw_case(pick, group.num_ranks, decode=True)
        self._quantize = pick.choice((None, None, *Scale))
        self._encoding = pick.choice(_ENCODINGS)
        self._numerics: Numerics = pick.choice(("exact", "fast"))
        if self._quantize is not None or self._encoding != "same":
            case = replace(case, hidden=128 * pick.choice((1, 2, 5)))
        if self._encoding == "logfmt10" and case.dtype == torch.float16:
            case = replace(case, dtype=torch.bfloat16)  # sums may be beyond float16, and infinity has no near code
        self._case, self._rank, self._device = case, group.rank, group.device
        self._view, self._nodes = group.for_shape(case.shape), group.topology.nodes
        self._inputs = case.inputs()
        mine = self._inputs[group.rank]
        assert mine.topk_weights is not None
        self._x = mine.x.to(group.device)
        self._routing = Routing(mine.topk_idx.to(group.device), mine.topk_weights.to(group.device))
        self._capacity = case.ranks * case.shape.max_tokens
        self._full = without(self._inputs, case.experts, self._capacity, _NONE)
        self._sent: DecodeDispatched[Tensor | Quantized] | None = None
        self._home: Tensor | None = None
        self._hook: Callable[[], None] = lambda: None
        hooks, call = (pick.random() < 0.5, pick.random() < 0.5), partial(_call, group)
        self._arrival = call("decode_dispatch", lambda: self._dispatch(hook=hooks[0]))
        self.calls = [self._arrival]
        if hooks[0]:
            self._arrival = call("decode_dispatch hook", self._receive)
            self.calls.append(self._arrival)
        self._return = call("decode_combine", lambda: self._combine(hook=hooks[1]))
        self.calls.append(self._return)
        if hooks[1]:
            self._return = call("decode_combine hook", self._receive)
            self.calls.append(self._return)
        self._what = f"rank {group.rank}, {case} decode {self._quantize} {self._numerics} {self._encoding} {hooks=}"

    def check(self) -> int:
        """See `Rounds.check`. On GPUs, the results of a call to which a rank was lost are undefined."""
        checks, cuda = 0, self._device.type == "cuda"
        if self._arrival.returned and not (cuda and self._arrival.disturbed):
            checks += self._check_rows(self._oracle(self._arrival))
        if self._return.returned and not (cuda and (self._arrival.disturbed or self._return.disturbed)):
            self._check_sum(self._oracle(self._return))
            checks += 1
        return checks

    def _oracle(self, call: Call) -> Oracle:
        return without(self._inputs, self._case.experts, self._capacity, call.masked)

    def _dispatch(self, *, hook: bool) -> None:
        self._sent = self._view.decode_dispatch(self._x, self._routing, quantize=self._quantize, return_hook=hook)
        self._hook = self._sent.hook

    def _receive(self) -> None:
        self._hook()

    def _combine(self, *, hook: bool) -> None:
        assert self._sent is not None
        # The rows lie where those of the dispatch lie, which depends on the ranks that were masked by then.
        oracle = self._oracle(self._arrival) if self._arrival.masked else self._full
        y = self._answers(oracle, self._rank).reshape(oracle.num_local, self._capacity, self._case.hidden)
        home = self._view.decode_combine(
            y.to(self._device), self._sent.plan, numerics=self._numerics, encoding=self._encoding, return_hook=hook
        )
        self._home, self._hook = home.x, home.hook

    def _answers(self, oracle: Oracle, there: int) -> Tensor:
        return answers(self._case, oracle, there, oracle.num_local * self._capacity, self._case.dtype)

    def _check_rows(self, oracle: Oracle) -> int:
        assert self._sent is not None
        x, hidden = self._sent.x, self._case.hidden
        counts = torch.tensor(oracle.expert_counts(self._rank), dtype=torch.int32, device="cpu")
        same_bits(f"{self._what} expert_counts", self._sent.expert_counts, counts)
        places = torch.tensor([row.place for row in oracle.rows(self._rank)], dtype=torch.int64, device=self._device)
        want = oracle.x(self._rank)
        if isinstance(x, Tensor):
            same_bits(f"{self._what} x", x.reshape(-1, hidden)[places], want)
            return 2
        casts = [fp8_cast(row, power_of_two=self._quantize is not Scale.FLOAT32) for row in want]
        if casts:
            scales = [ue8m0(scale) if self._quantize is Scale.UE8M0 else scale for _, scale in casts]
            data = torch.stack([cast.view(torch.uint8) for cast, _ in casts])
            same_bits(f"{self._what} data", x.data.view(torch.uint8).reshape(-1, hidden)[places], data)
            same_bits(f"{self._what} scale", x.scale.reshape(-1, x.scale.shape[2])[places], torch.stack(scales))
        return 3

    def _check_sum(self, oracle: Oracle) -> None:
        assert self._home is not None
        ys, fast = [self._answers(oracle, there) for there in range(oracle.num_ranks)], self._numerics == "fast"
        nodes = () if self._return.masked else self._nodes  # with masked ranks rows go directly
        want = oracle.decode_combine(self._rank, ys, fast=fast, encoding=self._encoding, nodes=nodes)
        if self._encoding != "logfmt10":
            same_bits(f"{self._what} sum", self._home, want)
            return
        # A number that is half-way between two codes may take either.
        one_code, magnitude = oracle.decode_slack(self._rank, ys, fast=fast, nodes=nodes)
        rounded = want.float().abs() * (0 if want.dtype == torch.float32 else torch.finfo(want.dtype).eps)
        close_each(f"{self._what} sum", self._home, want, magnitude * 2.0**-16 + rounded + 1.01 * one_code)


class LargeRows:
    """dispatch, combine and redispatch of many rows."""

    def __init__(self, group: ExpertGroup, seed: int) -> None:
        pick = random.Random(seed)
        large = soak_large.draw(pick, group.num_ranks)
        while sum(large.tokens) * large.hidden > _MOST_NUMBERS:
            large = soak_large.draw(pick, group.num_ranks)
        view = group.for_shape(large.shape)
        self.calls = [_call(group, "dispatch", lambda: soak_large.round_trip(view, large, None))]

    def check(self) -> int:
        """See `Rounds.check`; the call has compared all three results."""
        return 3 * self.calls[0].returned


class Replay:
    """Replays of a CUDA graph of decode calls; on CPUs the same calls without a graph."""

    def __init__(self, group: ExpertGroup, graph: Graph, seed: int) -> None:
        pick = random.Random(seed)
        self._group, self._graph = group, graph
        self._checks = 0
        drawn = [self._draw(graph.kind, pick.randrange(1 << 30)) for _ in range(pick.randint(1, 4))]
        self.calls = [_call(group, "decode replay", partial(self._replay, inputs)) for inputs in drawn]

    def check(self) -> int:
        """See `Rounds.check`; each call has compared its results."""
        return self._checks

    def _draw(self, kind: GraphKind, number: int) -> AllInputs:
        return draw_inputs(kind, self._group.num_ranks, self._group.device, 0, number)

    def _replay(self, inputs: AllInputs) -> None:
        group, kind, before = self._group, self._graph.kind, self._group.masked_ranks
        sent, total = self._graph.replay(inputs, eager=False)
        group.synchronize()
        away = group.masked_ranks
        if away != before:
            return  # a rank was lost between the two calls of the graph, or in one of them
        experts, R = kind.local * group.num_ranks, group.num_ranks
        topk_idx = inputs.topk_idx.clone()
        for rank in away:
            topk_idx[rank] = -1
            topk_idx = torch.where(topk_idx // kind.local == rank, -1, topk_idx)
        reference = Reference(
            replace(inputs, topk_idx=topk_idx), experts, group.rank, kind.fp8, fast=kind.fast, encoding=kind.encoding
        )
        nodes = () if away else group.topology.nodes  # with masked ranks rows go directly
        for name, wrong in reference.wrong(sent, total, nodes).items():
            assert not bool(wrong.any()), (
                f"rank {group.rank} of {R}, {kind}: {name}: {int(wrong.sum())} values are wrong"
            )
            self._checks += 1


def _call(group: ExpertGroup, name: str, run: Callable[[], object]) -> Call:
    return Call(name, run, lambda: group.masked_ranks)


def without(inputs: Sequence[Sent], num_experts: int, capacity: int, away: frozenset[int]) -> Oracle:
    """Return the oracle of a decode call: the ranks in ``away`` send nothing, and no token chooses their experts."""
    local, kept = num_experts // len(inputs), []
    for rank, one in enumerate(inputs):
        topk_idx = torch.full_like(one.topk_idx, -1) if rank in away else one.topk_idx
        for lost in away:
            topk_idx = torch.where(topk_idx // local == lost, -1, topk_idx)
        kept.append(replace(one, topk_idx=topk_idx))
    return Oracle(kept, num_experts, "masked", capacity=capacity)


def alternating(rounds: Sequence[Rounds], seed: int) -> list[Call]:
    """Return the calls of all rounds, each round's in their order; the same on all ranks.

    Replays come first: no hook of another call may be pending while a graph runs.
    """
    pick = random.Random(seed)
    order = [call for one in rounds if isinstance(one, Replay) for call in one.calls]
    waiting = [list(one.calls) for one in rounds if not isinstance(one, Replay)]
    while any(waiting):
        waiting = [calls for calls in waiting if calls]
        order.append(pick.choice(waiting).pop(0))
    return order
