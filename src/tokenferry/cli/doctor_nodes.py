"""Checks of the doctor for groups: a round trip, which nodes there are, how they were found, what carries rows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from tokenferry.api import ExpertGroup
from tokenferry.cli.finding import Finding, run_check
from tokenferry.errors import page_place
from tokenferry.types import BackendName, MoeShape, Routing

JOB_TIMEOUT_S = 60.0
NODES_SHOWN = 4


def shape_for(num_ranks: int) -> MoeShape:
    """Return the shape of a group for `round_trip`."""
    return MoeShape(2 * num_ranks, top_k=2 * num_ranks, hidden=64, max_tokens=16)


def round_trip(group: ExpertGroup) -> str:
    """Send rows to every expert and back, and check the result. Collective.

    Raises:
        ArithmeticError: the result is wrong.
    """
    generator = torch.Generator(device="cpu").manual_seed(group.rank)
    size = (16, group.shape.hidden)
    # Whole numbers, so that sums are exact in any order.
    x = torch.randint(-64, 65, size, generator=generator, dtype=torch.int64, device="cpu").float().to(group.device)
    experts = group.shape.num_experts
    chosen = torch.arange(16 * experts, dtype=torch.int64, device=group.device) % experts
    topk_idx = chosen.view(16, experts)
    sent = group.dispatch(x, Routing(topk_idx))
    assert isinstance(sent.x, torch.Tensor)
    back = group.combine(sent.x, sent.plan).x
    if not torch.equal(back, x * group.num_ranks):
        raise ArithmeticError("the rows that came back are not the rows that were sent")
    return f"round trip of 16 rows over {group.num_ranks} rank(s), transport {group.transport}, backend {group.backend}"


def describe(group: ExpertGroup) -> str:
    """Return the nodes of a group, how they were found, and what carries rows inside of nodes and between them."""
    where = group.topology
    shown = ", ".join(_ranks(ranks) for ranks in where.nodes[:NODES_SHOWN])
    more = f", and {where.num_nodes - NODES_SHOWN} more" if where.num_nodes > NODES_SHOWN else ""
    inside, _, between = group.transport.partition("+")
    carried = f"{inside} inside" if where.num_nodes == 1 else f"{inside} inside, {between or inside} between"
    return f"{where} (ranks {shown}{more}): {where.found}; {carried}"


def _ranks(ranks: Sequence[int]) -> str:
    first, last = ranks[0], ranks[-1]
    if len(ranks) > 2 and list(ranks) == list(range(first, last + 1)):
        return f"{first}..{last}"
    return " ".join(map(str, ranks))


def over_nodes(rank: int, pg: dist.ProcessGroup, ranks_per_node: int | None, backend: BackendName = "cpu") -> str:
    """Make a round trip, and describe the nodes; a job of `World`."""
    timeout_s = JOB_TIMEOUT_S / 2
    with ExpertGroup(
        pg, shape_for(pg.size()), backend=backend, timeout_s=timeout_s, ranks_per_node=ranks_per_node
    ) as group:
        group.warmup()
        round_trip(group)
        return f"{describe(group)}, backend {group.backend}"


def of_job() -> Finding:
    """Check the group of all ranks that torchrun started together, with the options of the environment. Collective."""

    def attempt() -> str:
        dist.init_process_group("gloo", timeout=timedelta(seconds=JOB_TIMEOUT_S))
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(dist.get_node_local_rank(0) % torch.cuda.device_count())
            assert dist.group.WORLD is not None
            return over_nodes(dist.get_rank(), dist.group.WORLD, None, "auto")
        finally:
            dist.destroy_process_group()

    return run_check("nodes of this job", attempt, f"see {page_place('across-nodes')}", required=True)
