"""The loads of experts, collected from calls and added up over the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.errors import ShapeError
from tokenferry.nn.balance.carrier import carried_on
from tokenferry.nn.balance.placement import Placement
from tokenferry.types import DecodeStats


class ExpertLoads:
    """Counters of the rows that this rank's experts received, for `balance`.

    Contract:
        `add` and `stats` are local, never wait for the device, and are capturable: replays of a CUDA graph count.
            `take` is collective and waits for the device.
        A counter is 32 bits wide, as those of decode calls: `take` before an expert has received 2^31 rows.

    Args:
        group: The group of the layers.
        num_layers: Layers that are counted separately.

    Example:
        >>> import torch, tokenferry
        >>> from tokenferry.nn.balance import ExpertLoads, Placement
        >>> group = tokenferry.ExpertGroup(None, tokenferry.MoeShape(3, 1, 8, max_tokens=4), backend="cpu")
        >>> loads, routing = ExpertLoads(group), tokenferry.Routing(torch.tensor([[0], [2], [2]]))
        >>> sent = group.dispatch(torch.ones(3, 8), routing)
        >>> loads.add(sent.expert_counts)
        >>> sent = group.decode_dispatch(torch.ones(3, 8), routing, stats=loads.stats())
        >>> loads.take(Placement.of(torch.arange(3), num_ranks=1)).tolist()
        [[2, 0, 4]]
    """

    def __init__(self, group: ExpertGroup, num_layers: int = 1) -> None:
        self._group = group
        with torch.inference_mode(False):  # else the counters could not be changed elsewhere
            sizes = (num_layers, group.num_local_experts)
            self._counts = torch.zeros(sizes, dtype=torch.int32, device=group.device)

    def add(self, expert_counts: Tensor, layer: int = 0) -> None:
        """Count the rows of one call.

        Args:
            expert_counts: ``[L]`` integers on the device of the group: those of a `Dispatched`, or of a `MoELayer`.
            layer: The layer that made the call.

        Raises:
            ShapeError: ``expert_counts`` is not ``[L]``.
        """
        counts = self._counts[layer]
        if expert_counts.shape != counts.shape:
            raise ShapeError(
                f"ExpertLoads: expert_counts: expected [L] = {list(counts.shape)}, got {list(expert_counts.shape)}; "
                "pass the counts of this rank's experts"
            )
        counts += expert_counts

    def stats(self, layer: int = 0) -> DecodeStats:
        """Return counters for `ExpertGroup.decode_dispatch`, which adds to them by itself.

        Contract: local; never waits for the device. The counters are those of this object, not a copy.

        Args:
            layer: The layer that makes the calls.

        Returns:
            DecodeStats: ``received`` ``[L]`` int32 on the device of the group; ``wait_ns`` is None.

        Raises:
            IndexError: there is no such layer.
        """
        return DecodeStats(received=self._counts[layer])

    def take(self, placement: Placement) -> Tensor:
        """Return what all ranks have counted for each logical expert, and start again from 0.

        Contract: collective, one all-reduce over the process group of the group; waits for the device.

        Args:
            placement: The placement while the rows were counted, of one layer (then of all) or of each.

        Returns:
            Tensor: ``[layers, E]`` int64 on the CPU, the same on all ranks.

        Raises:
            ShapeError: the placement has another number of slots, ranks or layers. The counters stay as they are.
            RuntimeError: torch's, if a rank does not come within the timeout of the process group, which is not
                ``timeout_s``; NCCL's watchdog may end the process instead. The counts of this rank are lost.
        """
        group, (num_layers, width) = self._group, self._counts.shape
        slots = placement.physical_to_logical
        if placement.num_slots != group.shape.num_experts or slots.shape[:-1] not in ((), (num_layers,)):
            raise ShapeError(
                f"ExpertLoads: placement: expected [{group.shape.num_experts}] or [{num_layers}, "
                f"{group.shape.num_experts}] slots, got {list(slots.shape)}; pass the one in use"
            )
        first = group.rank * width
        mine = slots[..., first : first + width].expand(num_layers, width)
        total = torch.zeros(num_layers, placement.num_experts, dtype=torch.int64, device="cpu")
        total.scatter_add_(1, mine, self._counts.to("cpu", torch.int64))
        self._counts.zero_()
        if group.process_group is not None and group.num_ranks > 1:
            on_way = total.to(carried_on(group.process_group, group.device))
            dist.all_reduce(on_way, group=group.process_group)
            total = on_way.cpu()
        return total
