"""From the experts that a router chooses to the slots that hold them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenferry.ambient import not_compiled
from tokenferry.api import ExpertGroup
from tokenferry.errors import ConfigError, ShapeError
from tokenferry.nn.balance.placement import Placement
from tokenferry.nn.wrappers import unwrapped
from tokenferry.types import Routing

_NUMBERS = 2
"""Of each row of a table, before the slots of its expert: how many there are, and where a rank begins."""


class ReplicaMap:
    """A map from logical to physical experts, which spreads the tokens of an expert over its replicas.

    Token t of rank r goes to replica ``(t + r) % n`` of an expert's n replicas: in turn, so that equally many go to
    each, and the same ones in every run. A repeated expert of a token stays one expert.

    Contract: local. CUDA: on torch's current stream; a call never waits for the device and is capturable, and graphs
    follow `place`.

    Args:
        placement: Of one layer; P is the ``num_experts`` of the group's shape.
        group: The group that gets the routings.
        nearest: Let an expert's tokens go to its replicas on the sender's node only, if there are any. Fewer rows cross
            the network; but replicas are shared unevenly if an expert has more on some nodes than on others, which
            `balance` does not expect. Without an effect if all replicas are on one node, as it places them with
            ``nodes=``.

    Raises:
        ConfigError: the placement does not fit the group.

    Example:
        >>> import torch, tokenferry
        >>> from tokenferry.nn.balance import Placement, ReplicaMap
        >>> group = tokenferry.ExpertGroup(None, tokenferry.MoeShape(4, 1, 8, max_tokens=4), backend="cpu")
        >>> to_slots = ReplicaMap(Placement.of(torch.tensor([0, 1, 1, 2]), num_ranks=1), group)
        >>> to_slots(tokenferry.Routing(torch.tensor([[1], [1], [2], [-1]]))).topk_idx.tolist()
        [[1], [2], [3], [-1]]
    """

    def __init__(self, placement: Placement, group: ExpertGroup, *, nearest: bool = False) -> None:
        nodes = group.topology.nodes
        self._num_slots = group.shape.num_experts
        self._num_ranks = group.num_ranks
        self._rank = group.rank
        # Of this rank's node, if it prefers them.
        self._near = list(nodes[group.topology.node]) if nearest and len(nodes) > 1 else []
        _check(placement, self._num_slots, self._num_ranks)
        num_experts, device = placement.num_experts, group.device
        with torch.inference_mode(False):  # else `place` could not change them elsewhere
            # As wide as the table of any placement with these sizes: CUDA graphs keep its address.
            sizes = (num_experts, _NUMBERS + self._num_slots - num_experts + 1)
            self._table = torch.empty(sizes, dtype=torch.int64, device=device)
        self.place(placement)

    @property
    def placement(self) -> Placement:
        """The placement in use: a copy."""
        return self._own.copy()

    @property
    def is_redundant(self) -> bool:
        """Whether there are more slots than experts."""
        return self._num_slots > self._table.shape[0]

    def place(self, placement: Placement) -> None:
        """Use another placement of as many experts from now on.

        Contract: local; every rank does it between the same two calls. CUDA: waits for the device.

        Raises:
            ConfigError: the placement does not fit the group, or has another number of experts.
        """
        _check(placement, self._num_slots, self._num_ranks)
        own = placement.copy()
        with torch.no_grad():
            self._table.copy_(_table_of(own, self._table.shape, self._near, self._rank))
        self._own = own

    def __call__(self, routing: Routing) -> Routing:
        """Return a routing with the physical experts of one with logical experts; -1 stays -1.

        An id outside of [-1, E) becomes one outside of [-1, P), which the call that gets the routing refuses.

        Raises:
            ShapeError: ``topk_idx`` is not an integer ``[T, K]`` tensor on the device of the group.
        """
        return self._to_slots(routing, self._table)

    def follow(self, slots: Tensor, placed: Tensor) -> Callable[[Routing], Routing]:
        """Return the map of the placement ``slots``, which is that of this map if they are ``placed``.

        Local. For compiled code, which cannot decide by values; it goes on when `place` changes them.
        """
        table = _followed(slots, placed, self._table, self._near, self._rank, self._num_ranks)
        return partial(self._to_slots, table=table)

    def _to_slots(self, routing: Routing, table: Tensor) -> Routing:
        idx = routing.topk_idx
        if idx.ndim != 2 or idx.is_floating_point() or idx.device != table.device:
            raise ShapeError(
                f"ReplicaMap: topk_idx: expected integers [T, K] on {table.device}, got {idx.dtype} {list(idx.shape)} "
                f"on {idx.device}"
            )
        num_experts = table.shape[0]
        expert = idx.clamp(0, num_experts - 1).long()
        token = torch.arange(idx.shape[0], dtype=torch.int64, device=idx.device)[:, None]
        slot = table[expert, _NUMBERS + (token + table[expert, 1]) % table[expert, 0]].to(idx.dtype)
        slot = torch.where(idx < 0, idx, slot)
        return Routing(torch.where(idx < num_experts, slot, idx + self._num_slots), routing.topk_weights)


class PlacedRouter(nn.Module):
    """A router of logical experts for a layer of physical ones: pass it as ``router=`` to `MoELayer`.

    Contract:
        As the router that it wraps. `MoELayer` adds up the gradients of replicas in backward; programs that multiply by
            themselves have to do so, too. Norms of torch count each replica: clip with `tokenferry.nn.clip_grad_norm_`.
        torch.compile: with ``fullgraph=True``, in inference, and in training without replicas and without a bias of the
            router; one graph for all placements.
        The state dict holds ``physical_to_logical``, since experts are saved in the order of their slots. Loading it
            places them, also in place, as ``torch.distributed.checkpoint.load`` does it; on any number of ranks.

    Args:
        router: A module or function that maps ``[T, H]`` to a `Routing` over E logical experts.
        placement: Where the experts are: initially, until `rebalance` moves them.
        group: The group of the layer, made with P experts.
        nearest: As for `ReplicaMap`.

    Attributes:
        router: The router that was passed.

    Raises:
        ConfigError: the placement does not fit the group.

    Example:
        >>> import torch, tokenferry
        >>> from tokenferry.nn import MoELayer, Router
        >>> from tokenferry.nn.balance import PlacedRouter, balance
        >>> placement = balance(torch.tensor([9, 1, 1]), num_ranks=1, num_slots=3)
        >>> group = tokenferry.ExpertGroup(None, tokenferry.MoeShape(3, 2, 8, max_tokens=4), backend="cpu")
        >>> layer = MoELayer(group, ffn_hidden=16, router=PlacedRouter(Router(8, 3, 2), placement, group))
        >>> layer(torch.randn(4, 8)).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        router: Callable[[Tensor], Routing],
        placement: Placement,
        group: ExpertGroup,
        *,
        nearest: bool = False,
    ) -> None:
        super().__init__()
        self.router = router
        self._map = ReplicaMap(placement, group, nearest=nearest)
        with torch.inference_mode(False):  # else it would have no version
            # What state dicts hold. No buffer, which DDP, FSDP2 or `to_empty` would overwrite, move or cast.
            self._slots = self._map._own.physical_to_logical.clone()
            self._placed = self._slots.clone()  # those that the map has

    @property
    def is_redundant(self) -> bool:
        """Whether an expert has several replicas, as it has with every placement of these sizes."""
        return self._map.is_redundant

    @property
    def placement(self) -> Placement:
        """Where the experts are: a copy."""
        return self._current().copy()

    def _current(self) -> Placement:
        """Return where the experts are, also if a state dict was loaded: for those who read it only. Local.

        The same object until experts are placed otherwise.
        """
        self._follow_state()
        return self._map._own

    @not_compiled
    def _follow_state(self) -> None:
        """Place the experts as a state dict says whose tensors somebody has loaded into. Local.

        By values, since neither a write to ``.data`` nor compiled code changes the version that it would see. Both
        tensors are on the CPU. Lists can be compared even under torch's fake tensors.
        """
        if self._slots.tolist() != self._placed.tolist():
            self.place(Placement.of(self._slots, self._map._own.num_ranks))

    def place(self, placement: Placement) -> None:
        """Send tokens by another placement from now on; the weights are not moved: see `rebalance`.

        Contract: local; every rank does it between the same two calls. Nothing compares the placements of ranks: if
            they differ, tokens reach other experts than those that were chosen. CUDA: waits for the device; graphs
            follow it.

        Args:
            placement: Of one layer, with as many slots, experts and ranks as before; it is copied.

        Raises:
            ConfigError: the placement does not fit the group, or has another number of experts.
        """
        self._map.place(placement)
        with torch.no_grad():
            for slots in (self._slots, self._placed):
                slots.copy_(placement.physical_to_logical)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy, whose tensors can be changed wherever it was made."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        with torch.inference_mode(False):
            self._slots, self._placed = self._slots.clone(), self._placed.clone()
        self._follow_state()

    def forward(self, x: Tensor) -> Routing:
        """Route ``x`` ``[T, H]`` to slots."""
        if torch.compiler.is_compiling():
            return self._map.follow(self._slots, self._placed)(self.router(x))
        self._follow_state()
        return self._map(self.router(x))

    def reset_parameters(self) -> None:
        """Initialise the parameters of the router again, if it can do that. Local."""
        router = unwrapped(self.router)
        if hasattr(router, "reset_parameters"):
            router.reset_parameters()

    def get_extra_state(self) -> Tensor:
        """Return ``physical_to_logical`` for the state dict."""
        return self._slots

    def set_extra_state(self, state: Tensor) -> None:
        """Use the placement of a state dict. Local.

        torch.distributed.checkpoint passes a mark of its own instead of a placement if a full state dict that it loads
        has none. Then the placement stays as it is.

        Raises:
            ConfigError: the placement does not fit the group, or has another number of experts.
        """
        if type(state).__name__ == "_EXTRA_STATE":
            return
        self.place(Placement.of(state, self._map._own.num_ranks))


def _table_of(placement: Placement, sizes: torch.Size, near: list[int], rank: int) -> Tensor:
    """Return by expert the number of slots that a rank sends to, its place among the ranks that do so, and the slots.

    Args:
        placement: Where the experts are.
        sizes: Those of the table.
        near: Ranks whose slots are preferred.
        rank: The rank.

    Raises:
        ConfigError: the placement has another number of experts than the table.
    """
    num_experts, width = sizes
    if placement.num_experts != num_experts:
        raise ConfigError(
            f"ReplicaMap: placement: expected {num_experts} logical experts like before, got "
            f"{placement.num_experts}; make a new map"
        )
    rows, slots_per_rank = [], placement.num_slots // placement.num_ranks
    for slots in placement.logical_to_physical.tolist():
        chosen = [slot for slot in slots if slot >= 0]
        preferred = [slot for slot in chosen if slot // slots_per_rank in near]
        position = near.index(rank) if preferred else rank
        chosen = preferred or chosen
        rows.append([len(chosen), position, *chosen, *[0] * (width - _NUMBERS - len(chosen))])
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


@torch.library.custom_op(
    "tokenferry::followed_placement",
    mutates_args=(),
    schema="(Tensor slots, Tensor placed, Tensor table, int[] near, int rank, int num_ranks) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # a graph would keep the placement of its capture
)
def _followed(slots: Tensor, placed: Tensor, table: Tensor, near: list[int], rank: int, num_ranks: int) -> Tensor:
    """Return the table of the placement ``slots``: a copy of ``table``, which is that of ``placed``, or another."""
    if torch.equal(slots, placed):
        return table.clone()
    return _table_of(Placement.of(slots, num_ranks), table.shape, near, rank).to(table.device)


@_followed.register_fake
def _followed_fake(slots: Tensor, placed: Tensor, table: Tensor, near: list[int], rank: int, num_ranks: int) -> Tensor:
    return torch.empty_like(table)


def _check(placement: Placement, num_slots: int, num_ranks: int) -> None:
    if placement.physical_to_logical.ndim != 1:
        raise ConfigError(
            "ReplicaMap: placement: expected that of one layer, got "
            f"{len(placement.physical_to_logical)}; use placement.layer(i)"
        )
    if (placement.num_slots, placement.num_ranks) != (num_slots, num_ranks):
        raise ConfigError(
            f"ReplicaMap: placement: expected {num_slots} slots on {num_ranks} ranks like the group, got "
            f"{placement.num_slots} on {placement.num_ranks}; make the group with "
            f"MoeShape(num_experts={placement.num_slots}, ...)"
        )
