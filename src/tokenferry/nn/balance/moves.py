"""Moving experts to other ranks, between two steps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.errors import ArgumentError, ConfigError, ShapeError, TokenferryError
from tokenferry.nn.balance.carrier import carried_on
from tokenferry.nn.balance.placement import Placement
from tokenferry.nn.balance.sharers import check_sharers
from tokenferry.nn.expert_checks import buffers_by_expert
from tokenferry.nn.sharding import local_part
from tokenferry.topology import node_of_ranks

if TYPE_CHECKING:
    from tokenferry.nn.layer import MoELayer

_DIGEST_BYTES = 7  # of a positive int64


@dataclass(frozen=True, slots=True)
class Move:
    """An expert that has to get into a slot.

    Attributes:
        source, target: Slots, before and afterwards.
        sender, receiver: Their ranks.
    """

    source: int
    target: int
    sender: int
    receiver: int


def rebalance(layer: MoELayer, placement: Placement, *, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Move the experts of a layer into the slots of another placement, and send tokens there from now on.

    Contract:
        Collective, over the process group of the group, whose timeout applies; between two steps, not between a forward
            and its backward, which then raises torch's error, or is wrong if forward has cast the experts. Waits for
            the device.
        In place: parameters stay the same objects, so optimizers, FSDP2 and CUDA graphs go on with them. Experts that
            stay in their slot are not touched; others cost their bytes on the way, and memory for those of one
            parameter at a time.
        Gradients that exist are moved as well, and buffers of the experts with their L as the first dimension. Other
            buffers have to be the same for all experts: a single number, or with 1 as their first dimension.
        A moving average of the layer is a layer of its own, to be rebalanced.
        Outputs before and after differ by rounding only: by the order of sums.

    Args:
        layer: Its router is a `PlacedRouter`, which says where the experts are now.
        placement: Where they shall be: of one layer, with as many slots and experts.
        optimizer: Its state of these experts is moved along; None: there is none, or it does not matter any more. One
            that has all parameters of the experts that are trained; move the states of several with `move_experts`.

    Raises:
        ConfigError: the router is not a `PlacedRouter`, another layer shares it or the experts but not both, the
            placement does not fit, a buffer of the experts has another first dimension than L or 1, or has L and is not
            contiguous or on another device, or the optimizer lacks parameters of the experts, or keeps a state that
            does not belong to single experts.
        ArgumentError: ranks passed different placements, parameters or states. Nothing was moved.
        RuntimeError: torch's, if a rank does not come within the timeout of the process group, which is not
            ``timeout_s``; NCCL's watchdog may end the process instead. Experts may have been moved in part: load a
            checkpoint.
    """
    router = layer._placed
    if router is None:
        raise ConfigError(
            f"rebalance: layer: expected a router that is a PlacedRouter, got {type(layer.router).__name__}; pass "
            "MoELayer(..., router=PlacedRouter(router, placement, group))"
        )
    old = router._current()
    tensors, error, new = [], None, placement
    try:
        new = placement.copy()  # checked: somebody may have written to its tensors
        check_sharers(layer)
        for name, parameter in layer.experts.named_parameters():
            # Not the part of a detached DTensor, whose version is another: backward of an earlier forward has to raise.
            tensors.append(local_part(parameter).detach())
            if parameter.grad is not None:
                tensors.append(parameter.grad)
            if optimizer is not None:
                tensors += _state_of(name, parameter, optimizer)
        tensors += _buffers_of(layer)
    except TokenferryError as found:
        error = found
    try:
        _move(layer.group, tensors, old, new, error)
    finally:
        del error  # a cycle through this frame would keep the tensors alive
    router.place(new)


def move_experts(group: ExpertGroup, tensors: Sequence[Tensor], old: Placement, new: Placement) -> None:
    """Move rows of tensors, one for each slot of this rank, from the slots of one placement to those of another.

    Contract: as `rebalance`, for weights of any layer, and for what belongs to them, such as moving averages.

    Args:
        group: The group with P experts.
        tensors: ``[L, ...]`` contiguous, on the device of the group, or DTensors ``[P, ...]`` with such parts; the same
            on all ranks. Changed in place.
        old: The placement by which they are ordered, of one layer.
        new: The one by which they shall be.

    Raises:
        ShapeError: a tensor is not contiguous, or has another number of rows.
        ConfigError: the placements do not fit each other or the group.
        ArgumentError: ranks passed different placements or tensors. Nothing was moved.
        RuntimeError: a rank does not come, as in `rebalance`; tensors may have been changed in part.
    """
    _move(group, tensors, old, new, None)


def _move(
    group: ExpertGroup, tensors: Sequence[Tensor], old: Placement, new: Placement, error: TokenferryError | None
) -> None:
    parts: list[Tensor] = []
    with torch.no_grad():  # not as a decorator, whose frame would hold the error
        try:
            if error is None:
                parts = _checked(group, tensors, old, new)
        except TokenferryError as found:
            error = found
        agree(group, "" if error is not None else f"{[(part.shape, part.dtype) for part in parts]}", old, new)
        try:
            if error is not None:
                raise error
        finally:
            del error  # as above
        moves = list(_moves(old, new, node_of_ranks(group.topology.nodes)))
        for part in parts:
            move_part(group, part, moves)


def _buffers_of(layer: MoELayer) -> list[Tensor]:
    """Return the buffers of the experts of a layer that have a row for each of them."""
    found, device = buffers_by_expert(layer.group, layer.experts), layer.group.device
    for name, buffer in found.items():
        if buffer.device != device or not buffer.is_contiguous():
            raise ConfigError(
                f"rebalance: layer: the buffer {name} of its experts moves with them, and has to be contiguous and on "
                f"{device}, got strides {list(buffer.stride())} on {buffer.device}"
            )
    for name, buffer in layer.experts.named_buffers():
        if name not in found and buffer.shape[:1] not in ((), (1,)):
            raise ConfigError(
                f"rebalance: layer: the buffer {name} of its experts is {list(buffer.shape)}, and cannot be moved by "
                f"expert; give it the L={layer.group.num_local_experts} experts of this rank as the first dimension, "
                "or 1 if it is the same for all"
            )
    return [buffer.detach() for buffer in found.values()]


def _state_of(name: str, parameter: Tensor, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the state of a parameter that has a row for each expert."""
    if parameter.requires_grad and all(parameter is not p for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(
            f"rebalance: optimizer: it does not have the parameter {name} of the experts; pass the one that has all of "
            "them, or None, and move the states of several with move_experts"
        )
    for key, value in optimizer.state.get(parameter, {}).items():
        if value is None or isinstance(value, Number | str) or (isinstance(value, Tensor) and value.ndim == 0):
            continue  # such as the number of steps, which all experts share
        if not isinstance(value, Tensor) or value.shape[0] != parameter.shape[0]:
            what = list(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ConfigError(
                f"rebalance: optimizer: its state {key!r} is {what} for a parameter {list(parameter.shape)}, and "
                "cannot be moved by expert"
            )
        yield value


def _checked(group: ExpertGroup, tensors: Sequence[Tensor], old: Placement, new: Placement) -> list[Tensor]:
    """Return this rank's parts of the tensors."""
    sizes = {(p.physical_to_logical.ndim, p.num_slots, p.num_experts, p.num_ranks) for p in (old, new)}
    if len(sizes) != 1 or (1, group.shape.num_experts, group.num_ranks) not in {(a, b, d) for a, b, _, d in sizes}:
        raise ConfigError(
            f"move_experts: placements: expected two of one layer, with as many experts in {group.shape.num_experts} "
            f"slots on {group.num_ranks} ranks, got {list(old.physical_to_logical.shape)} and "
            f"{list(new.physical_to_logical.shape)} slots of {old.num_experts} and {new.num_experts} experts on "
            f"{old.num_ranks} and {new.num_ranks} ranks"
        )
    parts = [local_part(tensor) for tensor in tensors]
    for part in parts:
        if part.ndim == 0 or part.shape[0] != group.num_local_experts or not part.is_contiguous():
            raise ShapeError(
                f"move_experts: tensors: expected contiguous [L, ...] with L={group.num_local_experts}, got "
                f"{list(part.shape)} with strides {part.stride()}"
            )
        if part.device != group.device:
            raise ShapeError(f"move_experts: tensors: expected them on {group.device}, got one on {part.device}")
    return parts


def agree(group: ExpertGroup, what: str, old: Placement, new: Placement, call: str = "move_experts") -> None:
    """Raise ArgumentError on every rank if ranks moved different things, and on the others if one has an error."""
    process_group = group.process_group
    if process_group is None or group.num_ranks == 1:
        return
    text = f"{what} {old.physical_to_logical.tolist()} {new.physical_to_logical.tolist()}"
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES], "big") if what else -1
    device = carried_on(process_group, group.device)
    mine = torch.tensor([digest], dtype=torch.int64, device=device)
    found = [torch.empty_like(mine) for _ in range(group.num_ranks)]
    dist.all_gather(found, mine, group=process_group)
    digests = [int(one) for one in found]
    wrong = [rank for rank, one in enumerate(digests) if one == -1]
    if wrong and what:
        raise ArgumentError(f"{call}: arguments of rank {wrong[0]} are wrong; nothing was moved")
    other = next((rank for rank, one in enumerate(digests) if one != digests[0]), None)
    if not wrong and other is not None:
        raise ArgumentError(f"{call}: ranks 0 and {other} passed different placements or tensors; nothing was moved")


def _moves(old: Placement, new: Placement, node_of_rank: Sequence[int]) -> Iterator[Move]:
    """Yield what has to be moved, by target: from the same rank if it has the expert, else from the same node."""
    width = old.num_slots // old.num_ranks
    before = old.physical_to_logical.tolist()
    for target, expert in enumerate(new.physical_to_logical.tolist()):
        if before[target] == expert:
            continue
        receiver = target // width
        sources = [slot for slot in old.logical_to_physical[expert].tolist() if slot >= 0]
        here = [slot for slot in sources if slot // width == receiver]
        near = [slot for slot in sources if node_of_rank[slot // width] == node_of_rank[receiver]]
        best = here or near or sources
        source = best[target % len(best)]  # in turn, so that no rank sends all
        yield Move(source, target, source // width, receiver)


def move_part(group: ExpertGroup, part: Tensor, moves: Sequence[Move]) -> None:
    """Move the rows of one tensor. Rows are only written when all that is read here has been sent or copied."""
    rank, width = group.rank, part.shape[0]
    arriving = [m for m in moves if m.receiver == rank]
    inside = [m for m in arriving if m.sender == rank]
    outside = [m for m in arriving if m.sender != rank]
    kept = part[[m.source % width for m in inside]]
    received = exchanged(group, part, [m for m in moves if m.sender == rank and m.receiver != rank], outside)
    for rows, there in ((kept, inside), (received, outside)):
        part[[m.target % width for m in there]] = rows


def exchanged(group: ExpertGroup, part: Tensor, leaving: Sequence[Move], arriving: Sequence[Move]) -> Tensor:
    """Send rows of this rank, and return those that it receives, in the order of ``arriving``."""
    process_group, width = group.process_group, part.shape[0]
    rows = part.new_empty((len(arriving), *part.shape[1:]))
    if process_group is None or not (leaving or arriving):
        return rows
    device = carried_on(process_group, group.device)
    received = rows.to(device)
    # Between two ranks messages arrive in order, and both ranks go through the same moves.
    work = [
        dist.P2POp(dist.isend, _bytes(part[m.source % width].to(device)), group=process_group, group_peer=m.receiver)
        for m in leaving
    ]
    work += [
        dist.P2POp(dist.irecv, _bytes(received[i]), group=process_group, group_peer=m.sender)
        for i, m in enumerate(arriving)
    ]
    for request in dist.batch_isend_irecv(work):
        request.wait()
    return received.to(part.device)


def _bytes(row: Tensor) -> Tensor:
    """Return a row as bytes: not every backend sends every dtype."""
    return row.view(-1).view(torch.uint8)
