"""Dispatch and combine in a group of several nodes, beside each of their two legs alone.

The legs are the same rows in groups of one node: along a rail, where each rank is an expert to the others, and inside a
node, where a rank also has the tokens that it passes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.bench.core.checks import WrongAnswer, as_tensor, must_be_near, must_equal, raise_together
from tokenferry.bench.core.inputs import Inputs, Sizes, draw
from tokenferry.bench.core.session import Session, Settings, Step, open_session
from tokenferry.cost.rows import network_rows
from tokenferry.testing.world import Progress
from tokenferry.topology import Topology
from tokenferry.types import MoeShape, Plan, Routing


@dataclass(frozen=True, slots=True, eq=False)
class _Leg:
    """A group, what this rank sends in it, and what it has received."""

    group: ExpertGroup
    x: Tensor
    routing: Routing
    plan: Plan
    y: Tensor

    def dispatch(self, _iteration: int) -> object:
        return self.group.dispatch(self.x, self.routing)

    def combine(self, _iteration: int) -> object:
        return self.group.combine(self.y, self.plan)


def measure_nodes(rank: int, pg: dist.ProcessGroup, progress: Progress, settings: Settings) -> None:
    """Check, then time dispatch and combine of each T, and their legs in turns with them; a job of `World`.

    Raises:
        WrongAnswer: a group of one node delivers other rows or sums, or another number of rows crossed the network.
    """
    with open_session(rank, pg, progress, settings) as session, torch.no_grad():
        for tokens in settings.tokens:
            what = f"nodes, T={tokens}"
            session.send({"now": what})
            session.attempt(what, lambda tokens=tokens: _measure(session, settings.sizes(tokens)))  # type: ignore[misc]


def _measure(session: Session, sizes: Sizes) -> None:
    with _legs(session, sizes) as (whole, network, inside):
        topology = whole.group.topology
        crossed = _rows_across(whole, topology)
        _check(session, sizes, whole, crossed)
        calls: dict[str, Callable[[_Leg], Step]] = {
            "dispatch": lambda leg: leg.dispatch,
            "combine": lambda leg: leg.combine,
        }
        for name, call in calls.items():
            samples = session.time([call(leg) for leg in (whole, network, inside)])
            times = [asdict(session.summary(one.isolated)) for one in samples]
            case = {
                "call": name,
                "tokens": sizes.tokens,
                "nodes": str(topology),
                "transport": whole.group.transport,
                "rows_across": sum(session.gather(crossed)) / sizes.ranks,
                "row_bytes": 2 * sizes.hidden,
                **dict(zip(("whole", "network", "inside"), times, strict=True)),
            }
            session.send({"nodes": case})


@contextmanager
def _legs(session: Session, sizes: Sizes) -> Iterator[tuple[_Leg, _Leg, _Leg]]:
    """Open the group of several nodes and those of its legs; dispatch once in each. Collective."""
    pg, settings, rank = session.pg, session.settings, session.rank
    device = session.device.torch_device
    mine = draw(sizes, 0, rank, device)
    with ExitStack() as stack:

        def leg(
            group_pg: dist.ProcessGroup, shape: MoeShape, x: Tensor, routing: Routing, per_node: int | None
        ) -> _Leg:
            group = stack.enter_context(
                ExpertGroup(group_pg, shape, backend="cpu", timeout_s=settings.timeout_s, ranks_per_node=per_node)
            )
            sent = group.dispatch(x, routing)
            return _Leg(group, x, routing, sent.plan, sent.x.clone())

        whole = leg(pg, sizes.shape, mine.x, mine.routing, settings.ranks_per_node)
        topology = whole.group.topology
        nodes, top_k = topology.num_nodes, max(sizes.top_k, topology.num_nodes)
        rail_pg = _subgroup(pg, tuple(zip(*topology.nodes, strict=True)))
        weights = torch.ones(sizes.tokens, top_k, dtype=torch.float32, device=device)
        across = Routing(_other_nodes(sizes, mine, topology, top_k), weights)
        network = leg(rail_pg, MoeShape(nodes, top_k, sizes.hidden, sizes.tokens), mine.x, across, None)
        node_pg = _subgroup(pg, topology.nodes)
        x, routing = _passed_on(sizes, mine, topology, network, device)
        shape = MoeShape(sizes.experts // nodes, sizes.top_k, sizes.hidden, nodes * sizes.tokens)
        yield whole, network, leg(node_pg, shape, x, routing, topology.ranks_per_node)


def _subgroup(pg: dist.ProcessGroup, members: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """Return the process group of those ranks that this one belongs to. Collective: all ranks make all groups."""
    made: list[dist.ProcessGroup] = [dist.new_group(list(ranks), backend="gloo") for ranks in members]
    return next(group for group, ranks in zip(made, members, strict=True) if pg.rank() in ranks)


def _other_nodes(sizes: Sizes, mine: Inputs, topology: Topology, top_k: int) -> Tensor:
    """Return ``[T, top_k]``: the nodes other than this one that each token goes to, then -1."""
    nodes = topology.num_nodes
    goes = torch.zeros(sizes.tokens, nodes, dtype=torch.bool, device=mine.x.device)
    goes.scatter_(1, mine.topk_idx // (sizes.experts // nodes), True)
    goes[:, topology.node] = False
    chosen = torch.full((sizes.tokens, top_k), -1, dtype=torch.int64, device=mine.x.device)
    chosen[:, :nodes] = torch.where(goes, torch.arange(nodes, dtype=torch.int64, device=mine.x.device), -1)
    return chosen


def _passed_on(
    sizes: Sizes, mine: Inputs, topology: Topology, network: _Leg, device: torch.device
) -> tuple[Tensor, Routing]:
    """Return the rows that this rank sends inside its node, own and passed on ones, and their experts there."""
    rows, experts = [mine.x], [mine.topk_idx]
    came = torch.split(network.y, network.plan.src_counts.tolist())
    tokens = torch.split(network.plan.src_token, network.plan.src_counts.tolist())
    for peer, x, token in zip(topology.rail, came, tokens, strict=True):
        rows.append(x)
        experts.append(draw(sizes, 0, peer, device).topk_idx[token])
    width = sizes.experts // topology.num_nodes
    chosen = torch.cat(experts)
    here = torch.where(chosen // width == topology.node, chosen % width, -1)
    return torch.cat(rows), Routing(here, torch.ones(here.shape, dtype=torch.float32, device=device))


def _rows_across(whole: _Leg, topology: Topology) -> int:
    """Return how many rows of other nodes this rank has passed on, as its plan says."""
    return int((whole.plan._places[:, 0] != topology.node).sum())


def _check(session: Session, sizes: Sizes, whole: _Leg, crossed: int) -> None:
    """Compare with a group of one node, and the rows that crossed with one for each token and other node."""
    device, topology = session.device.torch_device, whole.group.topology
    routings = [draw(sizes, 0, rank, device).topk_idx for rank in topology.rail]
    views = [Topology(rank, topology.nodes) for rank in topology.rail]
    counted = [network_rows(one, sizes.experts, view) for one, view in zip(routings, views, strict=True)]
    least = sum(rows[topology.node] for rows in counted)
    with ExpertGroup(session.pg, sizes.shape, backend="cpu", ranks_per_node=sizes.ranks) as one_node:
        sent = one_node.dispatch(whole.x, whole.routing)
        home = one_node.combine(whole.y, sent.plan).x
    sums = whole.group.combine(whole.y, whole.plan).x
    errors = []
    try:
        must_equal("dispatch", whole.y, as_tensor(sent.x))
        must_be_near("combine", sums.float(), home.float(), relative=0.02, absolute=0.05)
    except WrongAnswer as error:
        errors.append(f"rank {session.rank}: {error}")
    if crossed != least:
        errors.append(f"rank {session.rank}: {crossed} rows came over the network, one for each token would be {least}")
    raise_together(session.pg, errors)
