"""Packing of replicas into ranks with equally many slots, so that the most loaded rank has little load.

A packing is a list of the experts in the slots of each rank. The load of an expert is shared evenly by its slots.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

import torch

Packing = list[list[int]]

_LEAST_GAIN = 1e-12
"""Swaps that gain less are rounding errors, and might go on for ever."""
_SWAPS_PER_SLOT = 8
"""More swaps than random loads have ever needed; a bound for others."""


def best_packing(loads: Sequence[float], num_ranks: int, width: int) -> Packing:
    """Place experts on ranks with ``width`` slots each, every expert at least once.

    Of several packings, all improved by swaps, the one with the smallest maximum: replicas made where the load per
    replica is highest and packed by load; and, if the experts can be divided evenly, a packing without replicas whose
    ranks split their own experts to fill the rest. The second makes sure that slots more are never worse than none.

    Args:
        loads: The load of each expert, at least 0.
        num_ranks: Ranks to pack into.
        width: Slots of each, so that ``len(loads) <= num_ranks * width`` and ``width <= len(loads)``.
    """
    num_experts = len(loads)
    found = [improved(_packed(loads, _replicas(loads, num_ranks * width, num_ranks), num_ranks, width), loads)]
    if num_experts % num_ranks == 0:
        few = num_experts // num_ranks
        by_number = [list(range(first, first + few)) for first in range(0, num_experts, few)]
        by_load = _packed(loads, [1] * num_experts, num_ranks, few)
        plain = min((improved(packing, loads) for packing in (by_number, by_load)), key=lambda p: highest(p, loads))
        found.append(improved(_filled(plain, loads, width), loads))
    best = min(found, key=lambda packing: highest(packing, loads))
    return [sorted(experts) for experts in best]


def improved(packing: Packing, loads: Sequence[float], *, enough: float = 0.0) -> Packing:
    """Swap a slot of the most loaded rank with one of another rank, the best pair first, as long as that helps.

    Args:
        packing: Holds every expert. Other slots stay as they are, so that few experts have to be moved.
        loads: The load of each expert.
        enough: A load that needs no further swaps.
    """
    each = _each(packing, loads)
    slots = [list(experts) for experts in packing]
    weights = torch.tensor([[each[e] for e in experts] for experts in slots], dtype=torch.float64, device="cpu")
    for _ in range(_SWAPS_PER_SLOT * weights.numel()):
        totals = weights.sum(1)
        top = int(totals.argmax())
        moved = weights[top, :, None, None] - weights  # [slot of this rank, other rank, its slot]
        worst = torch.maximum(totals[top] - moved, totals[:, None] + moved)
        best = worst.min()
        if totals[top] <= enough or not best < totals[top] * (1 - _LEAST_GAIN):
            break
        mine, rank, other = (worst == best).nonzero()[0].tolist()
        slots[top][mine], slots[rank][other] = slots[rank][other], slots[top][mine]
        for changed in (top, rank):
            weights[changed] = torch.tensor([each[e] for e in slots[changed]], dtype=torch.float64, device="cpu")
    return slots


def highest(packing: Packing, loads: Sequence[float]) -> float:
    """Return the load of the most loaded rank."""
    each = _each(packing, loads)
    return max(sum(each[expert] for expert in experts) for experts in packing)


def _replicas(loads: Sequence[float], num_slots: int, most: int) -> list[int]:
    """Return the number of slots of each expert: each further one goes where the load per slot is highest.

    No other numbers have a lower highest load per slot. More than ``most`` slots, one a rank, would help nobody.
    """
    counts = [1] * len(loads)
    # Among equal loads the expert with fewer slots, then the lower number: all ranks decide alike.
    waiting = [(-load, 1, expert) for expert, load in enumerate(loads) if most > 1]
    heapq.heapify(waiting)
    for _ in range(num_slots - len(loads)):
        _, count, expert = heapq.heappop(waiting)
        counts[expert] = count + 1
        if count + 1 < most:
            heapq.heappush(waiting, (-loads[expert] / (count + 1), count + 1, expert))
    return counts


def _packed(loads: Sequence[float], counts: Sequence[int], num_ranks: int, width: int) -> Packing:
    """Place replicas, the heaviest first, on the least loaded rank that has a slot, if possible without that expert."""
    packing: Packing = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    each = [load / count for load, count in zip(loads, counts, strict=True)]
    for expert in sorted(range(len(loads)), key=lambda e: (-each[e], e)):
        for _ in range(counts[expert]):
            free = (rank for rank in range(num_ranks) if len(packing[rank]) < width)
            rank = min(free, key=lambda r: (expert in packing[r], totals[r], r))
            packing[rank].append(expert)
            totals[rank] += each[expert]
    return packing


def _filled(packing: Packing, loads: Sequence[float], width: int) -> Packing:
    """Let each rank split its own experts until its slots are full, which changes the load of no rank."""
    filled = []
    for experts in packing:
        counts = _replicas([loads[expert] for expert in experts], width, width)
        filled.append([expert for expert, count in zip(experts, counts, strict=True) for _ in range(count)])
    return filled


def _each(packing: Packing, loads: Sequence[float]) -> list[float]:
    """Return the load of a slot of each expert."""
    counts = Counter(expert for experts in packing for expert in experts)
    return [load / counts[expert] for expert, load in enumerate(loads)]
