"""Pairs of decode calls in a group of several nodes, as one CUDA graph, beside each of their two legs alone.

What crosses has the same size in every call: M rows to each other node, and M sums back. The legs alone: between nodes,
as many bytes of rows and of sums by send and receive of `torch.distributed`; inside a node, a pair in a group of one
node, in which a rank also has the tokens that it acts for. On CPUs, which have no graphs, calls are made one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.bench.core.checks import WrongAnswer, must_be_near, must_equal, raise_together
from tokenferry.bench.core.device import no_collections
from tokenferry.bench.core.inputs import FP8_COLUMNS, Sizes, draw
from tokenferry.bench.core.session import Session
from tokenferry.bench.suites.decode import new_answers, without_index
from tokenferry.bench.suites.nodes import LEGS, Rail, open_inside, open_rail, open_whole, passed_on
from tokenferry.bench.suites.nodes_bytes import sent_across
from tokenferry.types import DecodeCombined, DecodeDispatched, Numerics, Quantized, Routing, Scale

MOST_TOKENS = 512
"""Decode calls are made for few tokens; of more only the other calls are measured."""

PAIRS = 8
"""Pairs in a graph."""


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """A group, what this rank sends in it, and what its experts answer."""

    group: ExpertGroup
    x: Tensor
    routing: Routing
    answers: Tensor

    @classmethod
    def make(cls, group: ExpertGroup, x: Tensor, routing: Routing) -> Pairs:
        """Let experts answer with zeros."""
        return cls(group, x, routing, torch.zeros_like(new_answers(group)))

    def run(self, numerics: Numerics) -> DecodeCombined:
        """Make a pair of calls."""
        sent = self.dispatch()
        return self.group.decode_combine(self.answers, sent.plan, numerics=numerics)

    def dispatch(self) -> DecodeDispatched[Quantized]:
        """Send rows in FP8."""
        return self.group.decode_dispatch(self.x, self.routing, quantize=Scale.FLOAT32)


@dataclass(frozen=True, slots=True, eq=False)
class Legs:
    """The calls of a group of several nodes, and those of each leg alone.

    Attributes:
        whole: The calls.
        inside: Those in this node alone.
        rows: Rows of a dispatch between nodes.
        sums: Sums of a combine between nodes.
    """

    whole: Pairs
    inside: Pairs
    rows: Rail
    sums: Rail

    def cross(self) -> None:
        """Exchange as much as crosses in a pair."""
        self.rows.dispatch(0)
        self.sums.combine(0)


@torch.no_grad()
def measure_node_pairs(session: Session) -> None:
    """Check, then time pairs of decode calls of each T, and their legs.

    Raises:
        WrongAnswer: sums are wrong.
    """
    for tokens in session.settings.tokens:
        if tokens <= MOST_TOKENS:
            what = f"decode calls across nodes, T={tokens}"
            session.attempt(what, _measure, session, session.settings.sizes(tokens))


def _measure(session: Session, sizes: Sizes) -> None:
    with _legs(session, sizes) as legs:
        topology = legs.whole.group.topology
        _check(session, legs.whole)
        for numerics in ("exact", "fast"):
            with no_collections():
                works = (partial(legs.whole.run, numerics), legs.cross, partial(legs.inside.run, numerics))
                seconds = [session.in_graphs(work, PAIRS) for work in works]
                [eager] = session.back_to_back([without_index(works[0])])
            sent = session.gather(sent_across(legs.whole.group, works[0]))
            item = {
                "numerics": numerics,
                "tokens": sizes.tokens,
                "nodes": str(topology),
                "transport": legs.whole.group.transport,
                "graphs": session.settings.backend == "cuda",
                "rows_across": (topology.num_nodes - 1) * sizes.tokens,
                "bytes_across": sum(t.nbytes for rail in (legs.rows, legs.sums) for t in rail.out.values()),
                "sent_bytes": sum(sent) / sizes.ranks,
                **session.summaries(dict(zip(("eager", *LEGS), (eager, *seconds), strict=True))),
            }
            session.send({"nodes decode": item})


@contextmanager
def _legs(session: Session, sizes: Sizes) -> Iterator[Legs]:
    """Open the groups. Collective."""
    device = session.device.torch_device
    mine = draw(sizes, 0, session.rank, device)
    with ExitStack() as stack:
        whole = Pairs.make(open_whole(stack, session, sizes), mine.x, mine.routing)
        topology = whole.group.topology
        inside = open_inside(stack, session, sizes, topology)
        x, routing = passed_on(sizes, mine, topology)
        # As many tokens as a rank acts for at most: those without an expert on this node cost little, and are in it.
        missing = inside.shape.max_tokens - len(x)
        ids = torch.nn.functional.pad(routing.topk_idx, (0, 0, 0, missing), value=-1)
        weights = torch.ones(ids.shape, dtype=torch.float32, device=device)
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
        rail_pg = open_rail(stack, session, topology)
        others = [node for node in range(topology.num_nodes) if node != topology.node]

        def rail(row_bytes: int) -> Rail:
            out, into = (
                {node: torch.zeros(sizes.tokens, row_bytes, dtype=torch.uint8, device=device) for node in others}
                for _ in range(2)
            )
            return Rail(rail_pg, out, into)

        pairs = Pairs.make(inside, x, Routing(ids, weights))
        yield Legs(whole, pairs, rail(sizes.row_bytes("fp8")), rail(sizes.row_bytes("bf16")))
        session.device.synchronize()


def _replayed(session: Session, whole: Pairs, numerics: Numerics) -> Tensor:
    """Return the sums of a pair from a replay of its graph."""
    sums: list[Tensor] = []
    session.device.capture(lambda: sums.append(whole.run(numerics).x))()
    session.device.synchronize()
    return sums[-1]


def _check(session: Session, whole: Pairs) -> None:
    """Compare sums with tokens, of experts that return what they get; and those of a graph with those of calls."""
    rows = whole.dispatch()
    assert isinstance(rows.x, Quantized)
    for expert, num in enumerate(rows.expert_counts.tolist()):
        factors = rows.x.scale[expert, :num].repeat_interleave(FP8_COLUMNS, 1)[:, : whole.x.shape[1]]
        whole.answers[expert, :num] = (rows.x.data[expert, :num].float() * factors).to(whole.answers.dtype)
    weights = whole.routing.topk_weights
    assert weights is not None
    wanted = whole.x.float() * weights.sum(1, keepdim=True)
    errors = []
    for numerics in ("exact", "fast"):
        done, from_graph = whole.run(numerics).x.clone(), _replayed(session, whole, numerics)
        try:
            # FP8 keeps 3 bits behind the point, of up to the largest of 128 columns; sums of nodes are rounded as well.
            must_be_near(f"{numerics} pair", done.float(), wanted, relative=0.08, absolute=0.08)
            must_equal(f"{numerics} pair, from a graph", from_graph, done)
        except WrongAnswer as error:
            errors.append(f"rank {session.rank}: {error}")
    raise_together(session.pg, errors)
