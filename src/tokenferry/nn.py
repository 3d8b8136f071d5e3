"""Routers, and a complete expert-parallel Mixture-of-Experts layer for training.

What to do with gradients (see `MoELayer`): backward computes those of the *sum of all ranks' losses*. Experts live on
one rank each and need nothing more; the gradients of everything that every rank has a copy of (the router, the rest of
the model) must be summed over the ranks. For the mean over R ranks, give each rank ``loss / R``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from tokenferry import autograd
from tokenferry.api import ExpertGroup
from tokenferry.errors import ConfigError, ShapeError
from tokenferry.types import Delivery, Layout, Routing

__all__ = ["MoELayer", "Router", "group_limited_topk", "softmax_topk"]

_SCORES_PER_GROUP = 2
_MAX_SEED = 2**40
_STREAMS_PER_SEED = 2**20
_ROUTER_STREAM = 0


def softmax_topk(logits: Tensor, top_k: int, *, normalize: bool = True) -> Routing:
    """Choose the ``top_k`` experts of the highest probability; equal ones in the order of their numbers.

    Contract: local, deterministic; differentiable through ``topk_weights``.

    Args:
        logits: ``[T, E]`` floating point; the softmax is taken in float32, of float64 in float64.
        top_k: K <= E.
        normalize: Whether a token's weights are divided by their sum.

    Returns:
        Routing: ``topk_idx`` ``[T, K]`` int64, best first, and ``topk_weights`` ``[T, K]`` float32.

    Raises:
        ShapeError: ``logits`` is no ``[T, E]`` of floating point.
        ConfigError: ``top_k`` is not in 1..E.

    Example:
        >>> import torch
        >>> from tokenferry.nn import softmax_topk
        >>> softmax_topk(torch.tensor([[0.0, 2.0, 0.0]]), top_k=2).topk_idx
        tensor([[1, 0]])
    """
    num_experts = _num_experts("softmax_topk", logits)
    _in_range("softmax_topk", "top_k", top_k, num_experts)
    scores = _wide(logits).softmax(dim=-1)
    topk_idx = _largest(scores, top_k)
    weights = scores.gather(1, topk_idx)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(topk_idx, weights.float())


def group_limited_topk(
    logits: Tensor,
    top_k: int,
    *,
    num_groups: int,
    top_groups: int,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> Routing:
    """Choose experts from few groups only, with sigmoid scores and a bias that steers the choice but not the weights.

    The gating of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2, and its released model): an expert's score is
    ``sigmoid(logit)``; for choosing, ``bias`` is added. A group of E / num_groups neighbours counts as the sum of its
    two best biased scores (the paper's K / top_groups, which is two there); the best ``top_groups`` groups stay, and
    from these the ``top_k`` best biased scores are chosen. Weights are the scores without bias, divided by their sum,
    times ``scale``. Equal scores are taken in the order of their numbers. With one group per node, a token visits at
    most ``top_groups`` nodes.

    Contract: local, deterministic; differentiable through ``topk_weights``.

    Args:
        logits: ``[T, E]`` floating point; scores are computed in float32, of float64 in float64.
        top_k: K <= top_groups * E / num_groups.
        num_groups: A divisor of E; 1 for no limit.
        top_groups: Groups that a token may use.
        bias: ``[E]`` floating point, or None. It has no gradient.
        scale: What a token's weights add up to.

    Returns:
        Routing: ``topk_idx`` ``[T, K]`` int64, best biased score first, and ``topk_weights`` ``[T, K]`` float32.

    Raises:
        ShapeError: ``logits`` is no ``[T, E]`` of floating point, or ``bias`` no ``[E]``.
        ConfigError: a count is out of its range.

    Example:
        >>> import torch
        >>> from tokenferry.nn import group_limited_topk
        >>> logits = torch.tensor([[9.0, 0.0, 3.0, 3.0]])  # one good expert, and one good group
        >>> group_limited_topk(logits, top_k=2, num_groups=2, top_groups=1).topk_idx
        tensor([[2, 3]])
    """
    call = "group_limited_topk"
    num_experts = _num_experts(call, logits)
    _in_range(call, "num_groups", num_groups, num_experts)
    if num_experts % num_groups:
        raise ConfigError(f"{call}: num_groups={num_groups} does not divide E={num_experts}; use a divisor of E")
    _in_range(call, "top_groups", top_groups, num_groups)
    width = num_experts // num_groups
    _in_range(call, "top_k", top_k, top_groups * width)
    if bias is not None and bias.shape != (num_experts,):
        raise ShapeError(f"{call}: bias: expected [E] = [{num_experts}], got {list(bias.shape)}; one number per expert")
    scores = _wide(logits).sigmoid()
    choice = scores.detach() if bias is None else scores.detach() + bias.detach().to(scores.dtype)
    if top_groups < num_groups:
        grouped = choice.view(-1, num_groups, width)
        value = grouped.sort(dim=-1, descending=True).values[..., :_SCORES_PER_GROUP].sum(dim=-1)
        kept = torch.zeros_like(value, dtype=torch.bool).scatter_(1, _largest(value, top_groups), True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1)
    topk_idx = _largest(choice, top_k)
    weights = scores.gather(1, topk_idx)
    total = weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)  # all may underflow to 0
    return Routing(topk_idx, (weights / total * scale).float())


class Router(nn.Module):
    """A linear layer and a gating: which experts each token goes to, and with what weights.

    Contract:
        Local; differentiable. Every rank holds a copy: sum its gradient over the ranks, as a replicated parameter.
        Computes in float32 (float64 rows: float64), whatever the dtype of the rows and of the weight.

    Args:
        hidden: H.
        num_experts: E.
        top_k: K.
        groups: None for `softmax_topk`; ``(num_groups, top_groups)`` for `group_limited_topk` with a bias per expert.
        scale: `group_limited_topk` only: what a token's weights add up to.
        seed: Every rank must give the same.

    Attributes:
        weight: ``[E, H]`` float32 parameter.
        bias: ``[E]`` float32 buffer, zero at first, or None with softmax; `update_bias` moves it, gradients do not.

    Raises:
        ConfigError: ``scale`` is given with softmax, or ``seed`` is out of range.

    Example:
        >>> import torch
        >>> from tokenferry.nn import Router
        >>> routing = Router(hidden=8, num_experts=16, top_k=4, groups=(4, 2), scale=2.5)(torch.randn(3, 8))
        >>> routing.topk_idx.shape, routing.topk_weights.sum(dim=1)
        (torch.Size([3, 4]), tensor([2.5000, 2.5000, 2.5000], grad_fn=<SumBackward1>))
    """

    weight: nn.Parameter
    bias: Tensor | None

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        *,
        groups: tuple[int, int] | None = None,
        scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if groups is None and scale != 1.0:
            raise ConfigError(f"Router: scale={scale} needs groups, e.g. groups=(1, 1); softmax weights add up to 1")
        self.top_k = top_k
        self.groups = groups
        self.scale = scale
        generator = _generator("Router", seed, _ROUTER_STREAM)
        self.weight = nn.Parameter(torch.randn(num_experts, hidden, generator=generator) * hidden**-0.5)
        self.register_buffer("bias", None if groups is None else torch.zeros(num_experts))

    def forward(self, x: Tensor) -> Routing:
        """Route ``x`` ``[T, H]``; see `softmax_topk` and `group_limited_topk`."""
        rows = _wide(x)
        logits = F.linear(rows, self.weight.to(rows.dtype))
        if self.groups is None:
            return softmax_topk(logits, self.top_k)
        num_groups, top_groups = self.groups
        return group_limited_topk(
            logits, self.top_k, num_groups=num_groups, top_groups=top_groups, bias=self.bias, scale=self.scale
        )

    @torch.no_grad()
    def update_bias(self, expert_counts: Tensor, *, rate: float = 0.001) -> None:
        """Make overloaded experts less likely and idle ones more: balance without an auxiliary loss.

        The rule of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): after a step, an expert's bias falls by ``rate`` if
        its load was above the mean, and rises by ``rate`` if it was below.

        Contract: local. Every rank must give the same counts, or the copies drift apart.

        Args:
            expert_counts: ``[E]`` tokens that each expert got from *all* ranks: every rank's `MoELayer.expert_counts`
                one after another, in rank order (an all-gather), added up over the steps since the last update.
            rate: The paper's gamma; 0.001 there.

        Raises:
            ConfigError: the router has no bias, as its gating is softmax.
            ShapeError: ``expert_counts`` is no ``[E]``.
        """
        if self.bias is None:
            raise ConfigError(
                "update_bias: this router has no bias; make it with groups, e.g. Router(..., groups=(1, 1))"
            )
        if expert_counts.shape != self.bias.shape:
            raise ShapeError(
                f"update_bias: expert_counts: expected [E] = {list(self.bias.shape)}, got {list(expert_counts.shape)}; "
                "gather the counts of all ranks"
            )
        counts = expert_counts.to(self.bias.device, torch.float64)
        self.bias += rate * torch.sign(counts.mean() - counts).to(self.bias.dtype)


class MoELayer(nn.Module):
    """SwiGLU experts spread over the ranks of a group: the sum of ``w_k * ((silu(x @ gate) * (x @ up)) @ down)``.

    Contract:
        Collective: forward (a dispatch and a combine) and backward (a combine and a redispatch). All ranks call both as
            often, with the same grad mode; T may differ and may be 0, also N.
        Host: waits for the counts, as `ExpertGroup.dispatch`. torch.compile: the counts break the graph, unless
            ``torch._dynamo.config.capture_scalar_outputs`` is set; then it compiles with ``fullgraph=True``.
        Gradients: of the *sum* over all ranks' losses. An expert's are complete on the rank that holds it: leave those
            alone. The router's, as those of every replicated parameter, are this rank's share: all-reduce them with
            SUM. For a mean over ranks, every rank starts backward from ``loss / R``. `replicated_parameters` and
            `expert_parameters` tell them apart.
        Parameters: drawn per expert of the whole layer, so that the same seed gives the same layer for every R.

    Args:
        group: Its shape says E, K and H. The layer does not close it.
        ffn_hidden: F, the width inside an expert.
        router: A module that maps ``[T, H]`` to a `Routing` with weights; None: `Router` with softmax, on the group's
            device.
        seed: In 0 .. 2^40 - 1; the same on every rank.
        dtype: Of the experts; None: torch's default. It must be the dtype of the rows.

    Attributes:
        gate, up: ``[L, H, F]`` parameters: this rank's experts.
        down: ``[L, F, H]`` parameter.
        expert_counts: ``[L]`` int32: rows that this rank's experts got in the last forward, from all ranks; None
            before it.

    Raises:
        ConfigError: ``ffn_hidden`` or ``seed`` is out of range.

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
            router = Router(shape.hidden, shape.num_experts, shape.top_k, seed=seed).to(group.device)
        self.router = router
        first = group.rank * group.num_local_experts
        drawn = [
            _draw_expert(seed, expert, shape.hidden, ffn_hidden)
            for expert in range(first, first + group.num_local_experts)
        ]
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.gate, self.up, self.down = (
            nn.Parameter(torch.stack(parts).to(group.device, dtype)) for parts in zip(*drawn, strict=True)
        )
        self.expert_counts: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Send each token of ``x`` ``[..., H]`` through its experts; at most M tokens. Returns ``[..., H]``.

        Raises:
            ShapeError: the dtype is not the experts'. And whatever `ExpertGroup.dispatch` raises.
        """
        if x.dtype != self.gate.dtype:
            raise ShapeError(f"MoELayer: x: expected {self.gate.dtype} as the experts, got {x.dtype}; call .to()")
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        sent = autograd.dispatch(self.group, rows, self.router(rows), delivery=Delivery(Layout.EXPERTS))
        assert isinstance(sent.x, Tensor)
        assert sent.topk_weights is not None
        self.expert_counts = sent.expert_counts
        counts = sent.expert_counts.tolist() if sent.host_counts is None else list(sent.host_counts)
        # An expert without rows runs too: ranks must not differ in their graphs, and its gradient is 0, not None.
        y = torch.cat([self._expert(e, part) for e, part in enumerate(torch.split(sent.x, counts))])
        y = y * sent.topk_weights.unsqueeze(1).to(y.dtype)
        return autograd.combine(self.group, y, sent.plan).x.reshape(x.shape)

    def _expert(self, expert: int, rows: Tensor) -> Tensor:
        return (F.silu(rows @ self.gate[expert]) * (rows @ self.up[expert])) @ self.down[expert]

    def expert_parameters(self) -> list[nn.Parameter]:
        """Parameters that only this rank holds: leave their gradients alone."""
        return [self.gate, self.up, self.down]

    def replicated_parameters(self) -> list[nn.Parameter]:
        """Parameters that every rank has a copy of: all-reduce their gradients with SUM."""
        mine = {id(parameter) for parameter in self.expert_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in mine]


def _draw_expert(seed: int, expert: int, hidden: int, ffn_hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """One expert's parameters, drawn in float32 on the CPU: they do not depend on where and how they will live."""
    generator = _generator("MoELayer", seed, _ROUTER_STREAM + 1 + expert)
    gate = torch.randn(hidden, ffn_hidden, generator=generator) * hidden**-0.5
    up = torch.randn(hidden, ffn_hidden, generator=generator) * hidden**-0.5
    down = torch.randn(ffn_hidden, hidden, generator=generator) * ffn_hidden**-0.5
    return gate, up, down


def _generator(call: str, seed: int, stream: int) -> torch.Generator:
    if not 0 <= seed < _MAX_SEED:
        raise ConfigError(f"{call}: seed: expected 0 .. 2^40 - 1, got {seed}")
    return torch.Generator().manual_seed(seed * _STREAMS_PER_SEED + stream)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _largest(scores: Tensor, count: int) -> Tensor:
    """The indices of each row's ``count`` largest; equal ones in their order, which `torch.topk` does not promise."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count].contiguous()


def _num_experts(call: str, logits: Tensor) -> int:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ShapeError(
            f"{call}: logits: expected floating point [T, E], got {logits.dtype} {list(logits.shape)}; "
            "reshape to one row per token"
        )
    return logits.shape[1]


def _in_range(call: str, name: str, value: int, high: int) -> None:
    if not 1 <= value <= high:
        raise ConfigError(f"{call}: {name}: expected 1 .. {high}, got {value}")
