"""A complete expert-parallel Mixture-of-Experts layer for training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenferry import autograd
from tokenferry.api import ExpertGroup
from tokenferry.errors import ConfigError, ShapeError
from tokenferry.nn.experts import draw_expert, swiglu
from tokenferry.nn.precision import autocast_dtype
from tokenferry.nn.router import GroupLimit, Router
from tokenferry.nn.seeds import FIRST_EXPERT_STREAM, generator
from tokenferry.nn.sharding import averaged_gradient, expert_mesh, sharded
from tokenferry.topology import most_nodes
from tokenferry.types import DispatchOptions, Layout, Routing

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_NARROW = (torch.bfloat16, torch.float16)
"""Dtypes of rows to which float32 experts are cast."""


class MoELayer(nn.Module):
    """SwiGLU experts spread over the ranks of a group: the sum of ``w_k * ((silu(x @ gate) * (x @ up)) @ down)``.

    Contract:
        Collective: forward (a dispatch and a combine) and backward (a combine and a redispatch). All ranks call both
            the same number of times, with the same grad mode; T and N may differ and may be 0.
        Host: waits for the counts, as `ExpertGroup.dispatch`. torch.compile: the counts break the graph, unless
            ``torch._dynamo.config.capture_scalar_outputs`` is set; then it compiles with ``fullgraph=True``.
        Gradients: those of the *mean over ranks* of the ranks' losses. The gradients of an expert are complete on the
            rank that holds it: do not reduce them. Those of the router, and of every replicated parameter, have to be
            averaged over the ranks, as DistributedDataParallel and FSDP2 do; see `expert_parameters`,
            `replicated_parameters` and `parallelize`.
        Parameters: drawn separately for each of the E experts, so that a seed gives the same layer for every R. The
            router's are float32. With several ranks those of the experts are DTensors ``[E, ...]``, of which each rank
            holds its part: state_dict, checkpoints, optimizers and norms are those of all experts.
        Device: the group's, whatever torch's default device; only under ``torch.device("meta")``, meta: then
            ``to_empty(device=group.device)`` and `reset_parameters` give the same layer.
        torch.autocast: as in `torch.nn.Linear`, rows and experts are cast to its dtype (float64 ones are not), rows
            travel in it, and the result has it. The router computes in float32, from the rows as they come.
        Narrow rows: for bfloat16 and float16 rows, float32 experts are cast to their dtype, as FSDP2 casts the rest of
            a model with a MixedPrecisionPolicy.

    Args:
        group: The group of the experts; its shape determines E, K and H. The layer does not close it.
        ffn_hidden: F, the intermediate size of an expert.
        router: A module that maps ``[T, H]`` to a `Routing` with weights; None: `Router` with softmax, on the group's
            device. A `Router` must not be able to choose more nodes than ``MoeShape.max_nodes``, which takes a
            `GroupLimit` if that is few; other routers are checked in each call.
        seed: Seed of the parameters, in 0 .. 2^40 - 1; the same on every rank.
        dtype: dtype of the experts and of the rows; None: torch's default dtype, as for the modules of `torch.nn`.

    Attributes:
        gate, up: ``[E, H, F]`` parameters, of which this rank holds ``[L, H, F]``: the two input projections.
        down: ``[E, F, H]`` parameter, likewise: the output projection.
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
        self.seed = seed
        device = torch.get_default_device()
        device = device if device.type == "meta" else group.device
        if router is None:
            with device:
                router = Router(shape.hidden, shape.num_experts, shape.top_k, seed=seed)
        _check_nodes(group, router)
        self.router = router
        dtype = torch.get_default_dtype() if dtype is None else dtype
        inward, outward = (shape.hidden, ffn_hidden), (ffn_hidden, shape.hidden)
        self.gate, self.up, self.down = (
            nn.Parameter(torch.empty(group.num_local_experts, *sizes, dtype=dtype, device=device))
            for sizes in (inward, inward, outward)
        )
        self._sharded = False
        mesh = expert_mesh(group)
        if mesh is not None:
            self.place_experts(mesh)
        self._draw_experts()
        self.expert_counts: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Send each token of ``x`` ``[..., H]``, at most M tokens, through its experts; return ``[..., H]``.

        Raises:
            ShapeError: without autocast, the dtype is neither that of the experts nor a narrow one for float32 experts.
                And whatever `ExpertGroup.dispatch` raises.
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
        """Return the rows, and this rank's gate, up and down, in one dtype: under autocast, in its dtype."""
        num_ranks = self.group.num_ranks
        experts = [averaged_gradient(part, num_ranks) for part in self._local_experts()]
        tensors: tuple[Tensor, ...] = (rows, *experts)
        narrow = autocast_dtype(rows.device.type)
        if narrow is None and rows.dtype in _NARROW and experts[0].dtype == torch.float32:
            narrow = rows.dtype
        if narrow is not None:
            tensors = tuple(t if t.dtype == torch.float64 else t.to(narrow) for t in tensors)
        if tensors[0].dtype != tensors[1].dtype:
            raise ShapeError(
                f"MoELayer: x: expected {tensors[1].dtype} like the experts, got {tensors[0].dtype}; call .to()"
            )
        return tensors

    def reset_parameters(self) -> None:
        """Draw the parameters again, from the seeds, into the tensors that they are in: the layer as it was made.

        Contract: local. Parameters on the meta device stay without values.
        """
        self._draw_experts()
        if isinstance(self.router, Router):
            self.router.reset_parameters()

    @torch.no_grad()
    def _draw_experts(self) -> None:
        weights = self._local_experts()
        if weights[0].device.type == "meta":
            generator("MoELayer", self.seed, FIRST_EXPERT_STREAM)  # refuses a bad seed
            return
        hidden, ffn_hidden = weights[0].shape[1:]
        first = self.group.rank * self.group.num_local_experts
        for i in range(self.group.num_local_experts):
            for weight, drawn in zip(weights, draw_expert(self.seed, first + i, hidden, ffn_hidden), strict=True):
                weight[i].copy_(drawn)

    def place_experts(self, mesh: DeviceMesh) -> None:
        """Replace the parameters of the experts by DTensors over this mesh, whose ranks are those of the group. Local.

        For `parallelize`, which checks the ranks.
        """
        for name in ("gate", "up", "down"):
            old = getattr(self, name)
            if getattr(old, "device_mesh", None) != mesh:
                part = old.to_local() if self._sharded else old
                setattr(self, name, nn.Parameter(sharded(part.detach(), mesh), requires_grad=old.requires_grad))
        self._sharded = True

    def _local_experts(self) -> list[Tensor]:
        """Return what this rank holds of gate, up and down."""
        weights: list[Any] = self.expert_parameters()
        # Not `hasattr(weight, "to_local")`: torch.compile finds no such attribute of a parameter.
        return [weight.to_local() for weight in weights] if self._sharded else weights

    def expert_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of which each rank holds its own part: do not reduce their gradients."""
        return [self.gate, self.up, self.down]

    def replicated_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of which every rank has a copy: average their gradients over the ranks."""
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
