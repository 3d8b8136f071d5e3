"""Dispatch, redispatch and combine in a group of several nodes, beside each of their two legs alone.

The legs are the same rows: between nodes, already packed, by send and receive of `torch.distributed`; inside a node by
the calls of a group of one node, in which a rank also has the tokens that it passes on.

Each call is timed alone, as a program feels it, and in CUDA graphs, where no host takes part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.bench.core.checks import (
    WrongAnswer,
    as_tensor,
    check_rows,
    expected_sums,
    must_be_near,
    must_equal,
    raise_together,
)
from tokenferry.bench.core.device import no_collections
from tokenferry.bench.core.inputs import Inputs, Sizes, draw, expert
from tokenferry.bench.core.session import Session, Step
from tokenferry.bench.suites.host_time import empty_us
from tokenferry.bench.suites.nodes_bytes import sent_across
from tokenferry.bench.suites.nodes_shim import v1_hints
from tokenferry.cost.rows import network_rows
from tokenferry.topology import Topology
from tokenferry.types import DispatchOptions, MoeShape, Plan, Routing

_EMPTY_BATCHES = 3
_ON_DEVICE = DispatchOptions(counts="device")
_CALLS = 2
"""Calls in a graph, which keeps the memory of each."""
LEGS = ("whole", "network", "inside")
"""A call and its two legs, in reports."""


@dataclass(frozen=True, slots=True, eq=False)
class _Calls:
    """A group, what this rank sends in it, and what it has received."""

    group: ExpertGroup
    x: Tensor
    routing: Routing
    plan: Plan
    y: Tensor

    @classmethod
    def make(cls, group: ExpertGroup, x: Tensor, routing: Routing) -> _Calls:
        """Dispatch once. Collective."""
        sent = group.dispatch(x, routing)
        return cls(group, x, routing, sent.plan, as_tensor(sent.x).clone())

    def dispatch(self, _iteration: int) -> object:
        return self.group.dispatch(self.x, self.routing)

    def dispatch_counted_on_device(self, _iteration: int) -> object:
        return self.group.dispatch(self.x, self.routing, options=_ON_DEVICE)

    def redispatch(self, _iteration: int) -> object:
        return self.group.redispatch(self.x, self.plan)

    def combine(self, _iteration: int) -> object:
        return self.group.combine(self.y, self.plan)


@dataclass(frozen=True, slots=True, eq=False)
class Rail:
    """The ranks of a rail, and by node the rows that this rank sends there and those that come from there."""

    group: dist.ProcessGroup
    out: Mapping[int, Tensor]
    into: Mapping[int, Tensor]

    def dispatch(self, _iteration: int) -> None:
        """Exchange rows. Collective."""
        self._exchange(self.out, self.into)

    def combine(self, _iteration: int) -> None:
        """Exchange a sum for each row, the opposite way. Collective."""
        self._exchange(self.into, self.out)

    def _exchange(self, send: Mapping[int, Tensor], recv: Mapping[int, Tensor]) -> None:
        operations = [
            dist.P2POp(operation, rows, group=self.group, group_peer=node)
            for operation, by_node in ((dist.irecv, recv), (dist.isend, send))
            for node, rows in by_node.items()
            if len(rows)
        ]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()


@torch.no_grad()
def measure_nodes(session: Session) -> None:
    """Check, then time the calls of each T, and their legs in turns with them.

    Raises:
        WrongAnswer: rows or sums are wrong, or another number of rows crossed the network.
    """
    for tokens in session.settings.tokens:
        what = f"nodes, T={tokens}"
        session.attempt(what, _measure, session, session.settings.sizes(tokens))


def _measure(session: Session, sizes: Sizes) -> None:
    with _legs(session, sizes) as (whole, network, inside):
        topology = whole.group.topology
        crossed = rows_across(whole.plan, topology)
        _check(session, sizes, whole, network, crossed)
        along: dict[str, list[Step]] = {
            "redispatch": [whole.redispatch, network.dispatch, inside.redispatch],
            "combine": [whole.combine, network.combine, inside.combine],
        }
        about = {"tokens": sizes.tokens, "nodes": str(topology), "transport": whole.group.transport}
        calls: dict[str, list[Step]] = {"dispatch": [whole.dispatch, network.dispatch, inside.dispatch], **along}
        for name, steps in calls.items():
            times = [one.isolated for one in session.time(steps)]
            rows, sent = sum(session.gather(crossed)) / sizes.ranks, _sent(session, whole.group, steps[0])
            case = {
                "call": name,
                **about,
                "rows_across": rows,
                "row_bytes": 2 * sizes.hidden,
                "sent_bytes": sent,
                "besides_bytes": sent - rows * 2 * sizes.hidden,
                "empty_us": empty_us(session, _EMPTY_BATCHES),
                **session.summaries(dict(zip(LEGS, times, strict=True))),
            }
            session.send({"nodes": case})
        counted: list[Step] = [whole.dispatch_counted_on_device, network.dispatch, inside.dispatch_counted_on_device]
        for name, steps in {"dispatch": counted, **along}.items():
            session.attempt(f"{name}, T={sizes.tokens}, in graphs", _measure_replays, session, name, steps, about)


def _measure_replays(session: Session, name: str, steps: Sequence[Step], about: Mapping[str, object]) -> None:
    """Time a call and its legs in graphs."""
    with no_collections():
        seconds = [session.in_graphs(partial(step, 0), _CALLS) for step in steps]
    graphs = session.settings.backend == "cuda"
    times = session.summaries(dict(zip(LEGS, seconds, strict=True)))
    session.send({"nodes replayed": {"call": name, "graphs": graphs, **about, **times}})


def _sent(session: Session, group: ExpertGroup, step: Step) -> float:
    """Return the bytes that a rank gives to the network in a call, mean over ranks. Collective."""
    sent: list[int] = session.gather(sent_across(group, lambda: step(0)))
    return sum(sent) / group.num_ranks


@contextmanager
def _legs(session: Session, sizes: Sizes) -> Iterator[tuple[_Calls, Rail, _Calls]]:
    """Open the group of several nodes and its legs; dispatch once in each. Collective."""
    mine = draw(sizes, 0, session.rank, session.device.torch_device)
    before = _outside_torch(session)
    with ExitStack() as stack:
        whole = _Calls.make(open_whole(stack, session, sizes), mine.x, mine.routing)
        topology = whole.group.topology
        if session.settings.backend == "cuda":
            _report_memory(session, sizes, whole, before)
        network = _rail(sizes, mine, topology, open_rail(stack, session, topology))
        network.dispatch(0)
        inside = open_inside(stack, session, sizes, topology)
        yield whole, network, _Calls.make(inside, *passed_on(sizes, mine, topology))
        session.device.synchronize()


def _rail(sizes: Sizes, mine: Inputs, topology: Topology, group: dist.ProcessGroup) -> Rail:
    """Pack the rows that cross."""
    out, into = {}, {}
    for node, peer in enumerate(topology.rail):
        if node != topology.node:
            out[node] = mine.x[going_to(sizes, mine, topology, node)]
            theirs = draw(sizes, 0, peer, mine.x.device)
            into[node] = torch.empty_like(theirs.x[going_to(sizes, theirs, topology, topology.node)])
    return Rail(group, out, into)


def open_whole(stack: ExitStack, session: Session, sizes: Sizes) -> ExpertGroup:
    """Open the group of several nodes, until the stack closes. Collective."""
    assert session.settings.ranks_per_node is not None
    return _open_group(stack, session, session.pg, sizes.shape, session.settings.ranks_per_node)


def open_inside(stack: ExitStack, session: Session, sizes: Sizes, topology: Topology) -> ExpertGroup:
    """Do the same for a group of this node alone, with its experts; M is the tokens of all ranks of a rail."""
    nodes = topology.num_nodes
    shape = MoeShape(sizes.experts // nodes, sizes.top_k, sizes.hidden, nodes * sizes.tokens)
    pg = _subgroup(stack, session, topology.nodes, "gloo")
    return _open_group(stack, session, pg, shape, topology.ranks_per_node)


def open_rail(stack: ExitStack, session: Session, topology: Topology) -> dist.ProcessGroup:
    """Connect the ranks of each rail, for the device's tensors, until the stack closes. Collective."""
    return _subgroup(stack, session, tuple(zip(*topology.nodes, strict=True)), session.settings.pg_backend)


def _open_group(
    stack: ExitStack, session: Session, pg: dist.ProcessGroup, shape: MoeShape, ranks_per_node: int
) -> ExpertGroup:
    backend, timeout_s = session.settings.backend, session.settings.timeout_s
    made = ExpertGroup(pg, shape, backend=backend, timeout_s=timeout_s, ranks_per_node=ranks_per_node)
    group = stack.enter_context(made)
    group.warmup()
    return group


def _subgroup(stack: ExitStack, session: Session, members: Sequence[Sequence[int]], backend: str) -> dist.ProcessGroup:
    """Return the process group of those ranks that this one belongs to. Collective: all ranks make all groups."""
    made: list[dist.ProcessGroup] = [dist.new_group(list(ranks), backend=backend) for ranks in members]
    group = next(group for group, ranks in zip(made, members, strict=True) if session.rank in ranks)
    stack.callback(dist.destroy_process_group, group)
    return group


def going_to(sizes: Sizes, inputs: Inputs, topology: Topology, node: int) -> Tensor:
    """Return the tokens that have an expert on a node."""
    return (inputs.topk_idx // (sizes.experts // topology.num_nodes) == node).any(1).nonzero().flatten()


def passed_on(sizes: Sizes, mine: Inputs, topology: Topology) -> tuple[Tensor, Routing]:
    """Return the rows that this rank sends inside its node, own and passed on ones, and their experts there."""
    rows, experts = [mine.x], [mine.topk_idx]
    for node, peer in enumerate(topology.rail):
        if node != topology.node:
            theirs = draw(sizes, 0, peer, mine.x.device)
            tokens = going_to(sizes, theirs, topology, topology.node)
            rows.append(theirs.x[tokens])
            experts.append(theirs.topk_idx[tokens])
    width = sizes.experts // topology.num_nodes
    chosen = torch.cat(experts)
    here = torch.where(chosen // width == topology.node, chosen % width, -1)
    return torch.cat(rows), Routing(here, torch.ones(here.shape, dtype=torch.float32, device=mine.x.device))


def rows_across(plan: Plan, topology: Topology) -> int:
    """Return how many rows of other nodes this rank has passed on, as its plan says. Local."""
    sizes, node = plan._host_sizes, topology.node
    if sizes:  # CUDA: tokens that come from each node, then those that go there
        return sum(num for source, num in enumerate(sizes[: topology.num_nodes]) if source != node)
    return int((plan._places[:, 0] != node).sum())


def _check(session: Session, sizes: Sizes, whole: _Calls, network: Rail, crossed: int) -> None:
    """Compare rows and sums with what they have to be, and the rows that crossed with their least number."""
    device, topology = session.device.torch_device, whole.group.topology
    from_rail = {node: draw(sizes, 0, peer, device) for node, peer in enumerate(topology.rail)}
    views = [Topology(rank, topology.nodes) for rank in topology.rail]
    counted = [network_rows(from_rail[node].topk_idx, sizes.experts, view) for node, view in enumerate(views)]
    least = sum(rows[topology.node] for rows in counted)
    sums = whole.group.combine(expert(whole.y, session.rank), whole.plan).x
    errors = []
    try:
        check_rows("dispatch", sizes, 0, session.rank, whole.y)
        # The sum of each node is rounded before it crosses.
        wanted = expected_sums(sizes, from_rail[topology.node]).float()
        must_be_near("combine", sums.float(), wanted, relative=0.02, absolute=0.05)
        for node, rows in network.into.items():
            tokens = going_to(sizes, from_rail[node], topology, topology.node)
            must_equal(f"rows from node {node} alone", rows, from_rail[node].x[tokens])
    except WrongAnswer as error:
        errors.append(f"rank {session.rank}: {error}")
    if crossed != least:
        errors.append(f"rank {session.rank}: {crossed} rows came over the network, one for each token would be {least}")
    raise_together(session.pg, errors)


# ---------------------------------------------------------------------- memory


def _outside_torch(session: Session) -> float:
    """Return the bytes of this rank's GPU that torch does not manage, for each of the ranks that use it. Collective."""
    if session.settings.backend != "cuda":
        return 0.0
    session.synchronize_ranks()
    gpu = torch.cuda.current_device()
    reserved: list[int] = [
        num_bytes for where, num_bytes in session.gather((gpu, torch.cuda.memory_reserved())) if where == gpu
    ]
    used = session.device.used_bytes()
    session.synchronize_ranks()  # nobody goes on before all have looked
    return (used - sum(reserved)) / len(reserved)


def _report_memory(session: Session, sizes: Sizes, whole: _Calls, before: float) -> None:
    """Report what the group has taken since ``before``, and what a dispatch and a combine take. Collective."""
    group = _outside_torch(session) - before
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    whole.dispatch(0)
    whole.combine(0)
    session.device.synchronize()
    call = torch.cuda.max_memory_allocated() - held
    groups, calls = zip(*session.gather((group, call)), strict=True)
    backend: Any = whole.group._backend  # the API has no method for this
    item = {
        "tokens": sizes.tokens,
        "group_bytes": max(groups),
        "window_bytes": backend.context.window.num_bytes,
        "call_bytes": max(calls),
        **v1_hints(sizes, whole.group.topology.ranks_per_node),
    }
    session.send({"nodes memory": item})
