"""From the loads of experts to replicas, and their places on the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenferry.errors import ArgumentError, ConfigError, ShapeError, several
from tokenferry.nn.balance.packing import Packing, best_packing, highest, improved
from tokenferry.nn.balance.placement import Placement, check_divides

_GOOD_ENOUGH = 1.02
"""How much more load than necessary is better than moving most experts."""


def balance(
    loads: Tensor,
    num_ranks: int,
    num_slots: int,
    *,
    nodes: Sequence[Sequence[int]] | None = None,
    num_groups: int = 1,
    previous: Placement | None = None,
) -> Placement:
    """Decide which experts get replicas, and where all of them go, so that the most loaded rank has little load.

    Global: each slot more than experts goes to the expert with the highest load per replica; then replicas are packed
    into ranks, the heaviest first, each into the least loaded rank with a free slot; then slots of the most loaded
    rank are swapped with others as long as that helps. By node: groups of neighbouring experts are first packed into
    the nodes, equally many into each; then each node does the same with the experts that it has. So a router that
    limits the groups of a token, such as `GroupLimit`, limits its nodes too. Groups in the order of their numbers are
    tried as well, if that gives each node whole ones.

    The most loaded rank never has more load than without replicas (P = E), nor than with expert e in slot e, where the
    nodes and groups allow that. Not optimal: the problem contains that of dividing numbers into equal sums. Two
    replicas of an expert share a rank only if nothing better was found.

    Contract: local, on the CPU; reads ``loads`` from its device. The same loads give the same placement.

    Args:
        loads: ``[E]`` or ``[layers, E]``: the load of each expert, such as the rows that it received.
        num_ranks: R.
        num_slots: P, a multiple of R and at least E: the physical experts of all ranks. At most R * E.
        nodes: The ranks of each node, equally many: `Topology.nodes`; None: place globally.
        num_groups: Groups of neighbouring experts that stay on a node (with ``nodes`` only); a multiple of the number
            of nodes, and a divisor of E.
        previous: The placement in use, of as many layers. If swaps of some of its slots suffice for at most 2 % more
            load than without it, they are all that changes, so that few experts have to be moved.

    Returns:
        Placement: of one layer for ``[E]``, else of all.

    Raises:
        ShapeError: ``loads`` has another shape, or no numbers.
        ArgumentError: a load is negative, infinite or NaN.
        ConfigError: the sizes do not fit together.

    Example:
        >>> import torch
        >>> from tokenferry.nn.balance import balance
        >>> loads = torch.tensor([40, 10, 10, 20])
        >>> placement = balance(loads, num_ranks=2, num_slots=6)
        >>> placement.physical_to_logical.tolist(), placement.num_replicas.tolist()
        ([0, 1, 3, 0, 2, 3], [2, 1, 1, 2])
        >>> placement.rank_loads(loads).tolist()  # experts 0 and 1 on rank 0 would be 50 and 30
        [40.0, 40.0]
    """
    if loads.ndim not in (1, 2) or loads.numel() == 0 or loads.is_complex():
        raise ShapeError(
            f"balance: loads: expected numbers [E] or [layers, E], got {loads.dtype} {list(loads.shape)}; pass one "
            "number for each expert"
        )
    rows = loads.detach().to("cpu", torch.float64).reshape(-1, loads.shape[-1])
    if not bool((rows.isfinite() & (rows >= 0)).all()):
        raise ArgumentError("balance: loads: expected finite numbers from 0 on; pass counts of rows, or their means")
    check_divides("balance", num_slots, num_ranks)
    places = [list(range(num_ranks))] if nodes is None else [list(ranks) for ranks in nodes]
    groups = 1 if nodes is None else num_groups
    if nodes is None and num_groups != 1:
        raise ConfigError(f"balance: num_groups={num_groups} needs nodes=, e.g. group.topology.nodes")
    _check_sizes(loads.shape[-1], num_slots, num_ranks, groups, places)
    olds = [None] * len(rows) if previous is None else _packings(previous, loads, num_slots, num_ranks)
    found = []
    for row, old in zip(rows.tolist(), olds, strict=True):
        best = _placed(row, groups, places, num_slots // num_ranks)
        kept = None if old is None else _kept(row, old, places, groups, _GOOD_ENOUGH * highest(best, row))
        found.append(best if kept is None else kept)
    slots = torch.tensor(found, dtype=torch.int64, device="cpu")
    return Placement.of(slots.view(*loads.shape[:-1], num_slots), num_ranks)


def _check_sizes(num_experts: int, num_slots: int, num_ranks: int, num_groups: int, places: list[list[int]]) -> None:
    num_nodes = len(places)
    if sorted(rank for ranks in places for rank in ranks) != list(range(num_ranks)) or len(set(map(len, places))) != 1:
        raise ConfigError(
            f"balance: nodes: expected each of {num_ranks} ranks on one of equally large nodes, got {places}"
        )
    if num_groups < 1 or num_groups % num_nodes or num_experts % num_groups:
        raise ConfigError(
            f"balance: num_groups={num_groups}: expected a multiple of {num_nodes} nodes that divides E={num_experts}"
        )
    most = num_ranks * (num_experts // num_nodes)
    if not num_experts <= num_slots <= most:
        counts = f"{several(num_ranks, 'rank')} on {several(num_nodes, 'node')} and E={num_experts} experts"
        use = f"{most}" if most == num_experts else f"{num_experts} to {most}"
        raise ConfigError(
            f"balance: num_slots={num_slots}: with {counts} use {use}; each expert has at least one slot, and at most "
            "one on each rank of its node"
        )


def _packings(previous: Placement, loads: Tensor, num_slots: int, num_ranks: int) -> list[Packing]:
    """Return the experts in the slots of each rank, by layer."""
    wanted = (list(loads.shape), num_slots, num_ranks)
    got = (list(previous.num_replicas.shape), previous.num_slots, previous.num_ranks)
    if got != wanted:
        raise ConfigError(
            f"balance: previous: expected a placement of {wanted[0]} experts in {num_slots} slots on {num_ranks} "
            f"ranks, got {got[0]} in {got[1]} on {got[2]}; leave it out to start afresh"
        )
    found: list[Packing] = previous.physical_to_logical.view(-1, num_ranks, num_slots // num_ranks).tolist()
    return found


def _placed(loads: list[float], num_groups: int, places: list[list[int]], width: int) -> Packing:
    """Return the experts in the slots of each rank of one layer."""
    size = len(loads) // num_groups
    sums = [sum(loads[first : first + size]) for first in range(0, len(loads), size)]
    by_load = best_packing(sums, len(places), num_groups // len(places))
    found = [_packed_by_node(loads, by_load, places, width)]
    by_number = _groups_by_number(len(loads), num_groups, places)
    if by_number is not None and by_number != by_load:
        found.append(_packed_by_node(loads, by_number, places, width))
    return min(found, key=lambda packing: highest(packing, loads))


def _packed_by_node(loads: list[float], by_node: Packing, places: list[list[int]], width: int) -> Packing:
    """Return the experts in the slots of each rank, if each node has these groups."""
    size = len(loads) // sum(map(len, by_node))
    found: dict[int, list[int]] = {}
    for ranks, groups in zip(places, by_node, strict=True):
        experts = [expert for group in groups for expert in range(group * size, (group + 1) * size)]
        packing = best_packing([loads[expert] for expert in experts], len(ranks), width)
        found |= {rank: [experts[i] for i in slots] for rank, slots in zip(ranks, packing, strict=True)}
    return [found[rank] for rank in range(len(found))]


def _groups_by_number(num_experts: int, num_groups: int, places: list[list[int]]) -> Packing | None:
    """Return the groups of each node with expert e in slot e; None if these are no whole ones."""
    size, num_ranks = num_experts // num_groups, sum(map(len, places))
    if num_experts % num_ranks:
        return None
    few = num_experts // num_ranks
    found = [sorted({e // size for rank in ranks for e in range(rank * few, (rank + 1) * few)}) for ranks in places]
    return found if sum(map(len, found)) == num_groups else None


def _kept(loads: list[float], old: Packing, places: list[list[int]], num_groups: int, enough: float) -> Packing | None:
    """Return the old packing after some swaps within nodes, if no rank then has more load than ``enough``."""
    size = len(loads) // num_groups
    found: dict[int, list[int]] = {}
    held: list[int] = []
    for ranks in places:
        experts = sorted({expert for rank in ranks for expert in old[rank]})
        held += experts
        if len(experts) * len(places) != len(loads) or len({expert // size for expert in experts}) * size != len(
            experts
        ):
            return None  # it was not placed by these nodes and groups
        index = {expert: i for i, expert in enumerate(experts)}
        packing = [[index[expert] for expert in old[rank]] for rank in ranks]
        swapped = improved(packing, [loads[expert] for expert in experts], enough=enough)
        found |= {rank: [experts[i] for i in slots] for rank, slots in zip(ranks, swapped, strict=True)}
    kept = [found[rank] for rank in range(len(found))]
    return kept if len(set(held)) == len(loads) and highest(kept, loads) <= enough else None
