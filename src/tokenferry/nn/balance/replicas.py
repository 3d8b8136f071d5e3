"""Gradients of experts with replicas: each replica gets the sum of those of all replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenferry.api import ExpertGroup
from tokenferry.nn.balance.moves import Move, agree, exchanged, move_part
from tokenferry.nn.balance.placement import Placement


@dataclass(frozen=True, slots=True)
class _Sharing:
    """Which gradients ranks send each other, and what a rank adds up.

    Attributes:
        leaving: What this rank sends: a slot once to each other rank that has a replica.
        arriving: What it receives.
        terms: For slots of this rank whose expert has replicas: the places of all of them, by slot, in the slots of
            this rank with what arrives behind them. So all ranks add in the same order, and replicas get the same bits.
    """

    leaving: list[Move]
    arriving: list[Move]
    terms: dict[int, list[int]]


def share_gradients(group: ExpertGroup, placement: Placement, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of this rank's experts, whose gradients are added up over the replicas of each expert.

    Contract: local; backward is collective, over the process group of the group, whose timeout applies, and cannot be
    differentiated again. All replicas of an expert get the same bits.

    Args:
        group: The group with P experts.
        placement: Where they are.
        parts: ``[L, ...]`` each, by name.
    """
    if not placement.is_redundant or not torch.is_grad_enabled():
        return parts
    shared = _SharedGradients.apply(group, placement, *parts.values())  # type: ignore[no-untyped-call]
    return dict(zip(parts, shared, strict=True))


class _Context(Protocol):
    """The state that forward saves for backward."""

    group: ExpertGroup
    placement: Placement
    needs_input_grad: tuple[bool, ...]


class _SharedGradients(torch.autograd.Function):
    """One function for all parameters, so that ranks send their gradients in the same order."""

    @staticmethod
    def forward(group: ExpertGroup, placement: Placement, *parts: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.view_as(part) for part in parts)

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.group, ctx.placement, *_ = inputs

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sharing = _sharing(ctx.placement, ctx.group.rank)
        needed = zip(grads, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(_summed(ctx.group, grad, sharing) if wanted else None for grad, wanted in needed)


def _sharing(placement: Placement, rank: int) -> _Sharing:
    width = placement.num_slots // placement.num_ranks
    replicas = _replicas(placement)
    moves = [
        Move(source, target, source // width, target // width)
        for slots in replicas
        for source in slots
        for target in {slot // width: slot for slot in slots}.values()  # one on each rank
        if source // width != target // width
    ]
    arriving = [move for move in moves if move.receiver == rank]
    places = {slot: slot % width for slot in range(rank * width, rank * width + width)}
    places |= {move.source: width + i for i, move in enumerate(arriving)}
    terms = {
        slot % width: [places[other] for other in slots]
        for slots in replicas
        for slot in slots
        if slot // width == rank
    }
    return _Sharing([move for move in moves if move.sender == rank], arriving, terms)


def _replicas(placement: Placement) -> list[list[int]]:
    """Return the slots of each expert that has several."""
    replicas = [[slot for slot in slots if slot >= 0] for slots in placement.logical_to_physical.tolist()]
    return [slots for slots in replicas if len(slots) > 1]


def _summed(group: ExpertGroup, grad: Tensor, sharing: _Sharing) -> Tensor:
    """Return gradients ``[L, ...]`` of which those of replicas are sums, added in float32 at least."""
    grad = grad.contiguous()
    rows = [*grad, *exchanged(group, grad, sharing.leaving, sharing.arriving)]
    wide = torch.promote_types(grad.dtype, torch.float32)
    out = grad.clone()
    for slot, places in sharing.terms.items():
        total = rows[places[0]].to(wide, copy=True)
        for place in places[1:]:
            total += rows[place]
        out[slot] = total
    return out


@torch.no_grad()
def make_replicas_equal(group: ExpertGroup, placement: Placement, parts: Sequence[Tensor]) -> None:
    """Give all slots of an expert what its first slot has.

    Contract: collective, over the process group of the group, whose timeout applies.

    Args:
        group: The group with P experts.
        placement: Where they are.
        parts: What this rank has; those with values, and with its L experts as their first dimension, are changed.

    Raises:
        ArgumentError: ranks have different placements or tensors; on all ranks, and nothing was changed.
    """
    width = group.num_local_experts
    parts = [part for part in parts if not part.is_meta and part.shape[:1] == (width,)]
    what = str([(tuple(part.shape), part.dtype) for part in parts])
    agree(group, what, placement, placement, "parallelize")
    moves = [
        Move(slots[0], slot, slots[0] // width, slot // width) for slots in _replicas(placement) for slot in slots[1:]
    ]
    for part in parts:
        rows = part.contiguous()
        move_part(group, rows, moves)
        if rows is not part:
            part.copy_(rows)
