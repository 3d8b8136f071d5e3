"""Where the experts of each layer are: which logical expert each physical slot of a group holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.errors import ConfigError, ShapeError


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Experts on ranks: a router chooses *logical* experts, 0 .. E - 1; *physical* ones are the slots that hold them.

    Rank r has the slots ``r * S .. r * S + S - 1``, where S = P / R. A group that runs a placement is made with P
    experts. With P > E some experts have several *replicas*, which share their tokens.

    Attributes:
        physical_to_logical: ``[P]`` int64 on the CPU: the expert in each slot. ``[layers, P]`` for several layers.
        logical_to_physical: ``[E, C]`` or ``[layers, E, C]`` int64: the slots of each expert, ascending, then -1.
        num_replicas: ``[E]`` or ``[layers, E]`` int64: the number of slots of each expert, at most C.
        num_ranks: R, which divides P.
    """

    physical_to_logical: Tensor
    logical_to_physical: Tensor
    num_replicas: Tensor
    num_ranks: int

    @staticmethod
    def of(physical_to_logical: Tensor, num_ranks: int) -> Placement:
        """Return the placement with these experts in its slots.

        Contract: local. ``Placement.of(torch.arange(E), R)`` has expert e in slot e, as a layer without a placement.

        Args:
            physical_to_logical: ``[P]`` or ``[layers, P]`` integers, in which each of 0 .. E - 1 occurs.
            num_ranks: R.

        Raises:
            ShapeError: these are not integers, or have another shape.
            ConfigError: R does not divide P, or an expert is missing.
        """
        slots = physical_to_logical
        if slots.is_floating_point() or slots.is_complex() or slots.ndim not in (1, 2) or slots.numel() == 0:
            raise ShapeError(
                "Placement: physical_to_logical: expected integers [P] or [layers, P], got "
                f"{slots.dtype} {list(slots.shape)}; pass the expert of each slot"
            )
        check_divides("Placement", slots.shape[-1], num_ranks)
        slots = slots.detach().to("cpu", torch.int64, copy=True)
        rows = slots.reshape(-1, slots.shape[-1])
        num_experts = int(rows.max()) + 1
        if int(rows.min()) < 0:
            raise ConfigError(f"Placement: physical_to_logical: expected experts from 0 on, got {int(rows.min())}")
        counts = torch.zeros(len(rows), num_experts, dtype=torch.int64, device="cpu")
        counts.scatter_add_(1, rows, torch.ones_like(rows))
        missing = (counts == 0).nonzero().tolist()
        if missing:
            layer, expert = missing[0]
            raise ConfigError(
                f"Placement: physical_to_logical: no slot of layer {layer} holds expert {expert}; every one of 0 .. "
                f"{num_experts - 1} needs one"
            )
        # Sorted by expert, the slots of each follow each other: which of them a slot is follows from its position.
        order = rows.argsort(dim=1, stable=True)
        experts = rows.gather(1, order)
        position = torch.arange(rows.shape[1], dtype=torch.int64, device="cpu").expand_as(rows)
        replica = position - (counts.cumsum(1) - counts).gather(1, experts)
        most = int(counts.max())
        table = torch.full((len(rows), num_experts * most), -1, dtype=torch.int64, device="cpu")
        table.scatter_(1, experts * most + replica, order)
        shape = slots.shape[:-1]
        return Placement(slots, table.view(*shape, num_experts, most), counts.view(*shape, num_experts), num_ranks)

    @property
    def num_experts(self) -> int:
        """The number of logical experts, E."""
        return self.num_replicas.shape[-1]

    @property
    def num_slots(self) -> int:
        """The number of physical experts, P."""
        return self.physical_to_logical.shape[-1]

    @property
    def is_redundant(self) -> bool:
        """Whether an expert has several replicas."""
        return self.num_slots > self.num_experts

    def copy(self) -> Placement:
        """Return the same placement with tensors of its own. Local."""
        return Placement.of(self.physical_to_logical, self.num_ranks)

    def layer(self, index: int) -> Placement:
        """Return the placement of one of several layers. Local.

        Raises:
            ShapeError: this placement is that of one layer.
        """
        if self.physical_to_logical.ndim == 1:
            raise ShapeError("Placement.layer: this placement is that of one layer; use it as it is")
        return Placement.of(self.physical_to_logical[index], self.num_ranks)

    def rank_loads(self, loads: Tensor) -> Tensor:
        """Return the load of each rank, if the replicas of an expert share its load evenly.

        Contract: local.

        Args:
            loads: ``[E]`` or ``[layers, E]``, the load of each logical expert.

        Returns:
            Tensor: ``[R]`` or ``[layers, R]`` float64 on the CPU.

        Raises:
            ShapeError: ``loads`` does not have the shape of ``num_replicas``.
        """
        if loads.shape != self.num_replicas.shape:
            raise ShapeError(
                f"Placement.rank_loads: loads: expected {list(self.num_replicas.shape)}, got {list(loads.shape)}; pass "
                "one number for each logical expert"
            )
        each = loads.detach().to("cpu", torch.float64) / self.num_replicas
        by_slot = each.gather(-1, self.physical_to_logical)
        return by_slot.view(*by_slot.shape[:-1], self.num_ranks, -1).sum(-1)


def check_divides(call: str, num_slots: int, num_ranks: int) -> None:
    """Raise ConfigError unless every rank has equally many slots."""
    if num_ranks < 1 or num_slots < 1 or num_slots % num_ranks:
        raise ConfigError(
            f"{call}: num_ranks={num_ranks} does not divide {num_slots} slots; all ranks have equally many"
        )
