"""A complete expert-parallel Mixture-of-Experts layer for training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenferry import autograd
from tokenferry.api import ExpertGroup
from tokenferry.errors import ConfigError, ShapeError
from tokenferry.nn.experts import draw_expert, swiglu
from tokenferry.nn.precision import autocast_dtype
from tokenferry.nn.router import GroupLimit, Router
from tokenferry.topology import most_nodes
from tokenferry.types import DispatchOptions, Layout, Routing


class MoELayer(nn.Module):
    """SwiGLU experts spread over the ranks of a group: the sum of ``w_k * ((silu(x @ gate) * (x @ up)) @ down)``.

    Contract:
        Collective: forward (a dispatch and a combine) and backward (a combine and a redispatch). All ranks call both
            the same number of times, with the same grad mode; T and N may differ and may be 0.
        Host: waits for the counts, as `ExpertGroup.dispatch`. torch.compile: the counts break the graph, unless
            ``torch._dynamo.config.capture_scalar_outputs`` is set; then it compiles with ``fullgraph=True``.
        Gradients: those of the *sum* of all ranks' losses. The gradients of an expert are complete on the rank that
            holds it: do not reduce them. Those of the router, and of every replicated parameter, are this rank's share:
            all-reduce them with SUM. For the mean over ranks, call backward on ``loss / R`` on every rank. See
            `expert_parameters` and `replicated_parameters`.
        Parameters: drawn separately for each of the E experts, so that a seed gives the same layer for every R, on the
            group's device, whatever torch's default device. The router's are float32.
        torch.autocast: as in `torch.nn.Linear`, rows and experts are cast to its dtype (float64 ones are not), rows
            travel in it, and the result has it. The router computes in float32, from the rows as they come.

    Args:
        group: The group of the experts; its shape determines E, K and H. The layer does not close it.
        ffn_hidden: F, the intermediate size of an expert.
        router: A module that maps ``[T, H]`` to a `Routing` with weights; None: `Router` with softmax, on the group's
            device. A `Router` must not be able to choose more nodes than ``MoeShape.max_nodes``, which takes a
            `GroupLimit` if that is few; other routers are checked in each call.
        seed: Seed of the parameters, in 0 .. 2^40 - 1; the same on every rank.
        dtype: dtype of the experts and of the rows; None: torch's default dtype, as for the modules of `torch.nn`.

    Attributes:
        gate, up: ``[L, H, F]`` parameters: the two input projections of this rank's experts.
        down: ``[L, F, H]`` parameter: their output projection.
        expert_counts: ``[L]`` int32: rows that this rank's experts received in the last forward, from all ranks; None
            before the first.

    Raises:
        ConfigError: ``ffn_hidden`` or ``seed`` is out of range, or the router may choose experts on more nodes than
            ``max_nodes`` of the group.

    Example:
        >>> import torch, tokenferry
        >>> from tokenferry.nn import MoELayer
        >>> shape = tokenferry.MoeShape(num_experts=4, top_k=2, hidden=8, max_tokens=64)
        >>> group = tokenferry.ExpertGroup(None, shape, backend="cpu")
        >>> layer = MoELayer(group, ffn_hidden=16)
        >>> out = layer(torch.randn(2, 5, 8))
        >>> out.shape, int(layer.expert_counts.sum())
        (torch.Size([2, 5, 8]), 20)
    """

    def __init__(
        self,
        group: ExpertGroup,
        ffn_hidden: int,
        *,
        router: Callable[[Tensor], Routing] | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = group.shape
        if ffn_hidden < 1:
            raise ConfigError(f"MoELayer: ffn_hidden: expected a positive integer, got {ffn_hidden}")
        self.group = group
        if router is None:
            with group.device:
                router = Router(shape.hidden, shape.num_experts, shape.top_k, seed=seed)
        _check_nodes(group, router)
        self.router = router
        first = group.rank * group.num_local_experts
        drawn = [
            draw_expert(seed, expert, shape.hidden, ffn_hidden)
            for expert in range(first, first + group.num_local_experts)
        ]
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.gate, self.up, self.down = (
            nn.Parameter(torch.stack(parts).to(group.device, dtype)) for parts in zip(*drawn, strict=True)
        )
        self.expert_counts: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Send each token of ``x`` ``[..., H]``, at most M tokens, through its experts; return ``[..., H]``.

        Raises:
            ShapeError: the dtype is not that of the experts (without autocast). And whatever `ExpertGroup.dispatch`
                raises.
        """
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        cast, *experts = self._cast(rows)
        sent = autograd.dispatch(self.group, cast, self.router(rows), options=DispatchOptions(Layout.EXPERTS))
        assert sent.topk_weights is not None
        self.expert_counts = sent.expert_counts
        counts = sent.expert_counts.tolist() if sent.host_counts is None else list(sent.host_counts)
        # Run experts without rows too: all ranks must build the same graph, and their gradients must be 0, not None.
        parts = torch.split(sent.x, counts)
        y = torch.cat([swiglu(part, *expert) for part, *expert in zip(parts, *experts, strict=True)])
        y = y * sent.topk_weights.unsqueeze(1).to(y.dtype)
        return autograd.combine(self.group, y, sent.plan).x.reshape(x.shape)

    def _cast(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return the rows, gate, up and down in one dtype: under autocast, in its dtype."""
        tensors: tuple[Tensor, ...] = (rows, self.gate, self.up, self.down)
        narrow = autocast_dtype(rows.device.type)
        if narrow is not None:
            tensors = tuple(t if t.dtype == torch.float64 else t.to(narrow) for t in tensors)
        if tensors[0].dtype != tensors[1].dtype:
            raise ShapeError(
                f"MoELayer: x: expected {tensors[1].dtype} like the experts, got {tensors[0].dtype}; call .to()"
            )
        return tensors

    def expert_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that only this rank holds: do not reduce their gradients."""
        return [self.gate, self.up, self.down]

    def replicated_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of which every rank has a copy: all-reduce their gradients with SUM."""
        mine = {id(parameter) for parameter in self.expert_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in mine]


def _check_nodes(group: ExpertGroup, router: Callable[[Tensor], Routing]) -> None:
    """Raise ConfigError if a `Router` may choose experts on more nodes than the group allows."""
    shape = group.shape
    if shape.max_nodes is None or not isinstance(router, Router):
        return
    limit = GroupLimit(1, 1) if router.group_limit is None else router.group_limit
    nodes = group.topology.nodes
    chosen = most_nodes(nodes, shape.num_experts, router.top_k, limit.num_groups, limit.top_groups)
    if chosen > shape.max_nodes:
        raise ConfigError(
            f"MoELayer: router: with group_limit={router.group_limit} it may choose experts on {chosen} of "
            f"{len(nodes)} nodes, and the group has max_nodes={shape.max_nodes}; let it use fewer groups, or make the "
            f"group with MoeShape(max_nodes={chosen})"
        )
