"""Gating: the choice of the experts of each token, and of their weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenferry.errors import ConfigError, ShapeError
from tokenferry.nn.capacity import limited
from tokenferry.nn.losses import RouterLosses, load_balance_loss, z_loss
from tokenferry.nn.options import RouterOptions
from tokenferry.nn.precision import NARROW, product
from tokenferry.nn.recomputing import recomputing
from tokenferry.nn.seeds import ROUTER_STREAM, generator, initialised_tensor, normal
from tokenferry.nn.sharding import fill
from tokenferry.types import Routing

_SCORES_PER_GROUP = 2


@dataclass(frozen=True, slots=True)
class GroupLimit:
    """Limit of the groups of experts that a token may use; with one group per node, of the nodes that it visits.

    Args:
        num_groups: Groups of neighbouring experts; a divisor of E.
        top_groups: Groups that a token may use.

    Raises:
        ConfigError: ``num_groups`` is not positive, or ``top_groups`` is not in 1 .. num_groups.
    """

    num_groups: int
    top_groups: int

    def __post_init__(self) -> None:
        _check_size("GroupLimit", "num_groups", self.num_groups)
        _in_range("GroupLimit", "top_groups", self.top_groups, self.num_groups)


def softmax_topk(logits: Tensor, top_k: int, *, normalize: bool = True) -> Routing:
    """Choose the ``top_k`` experts with the highest probabilities; ties go to the lower index.

    A logit of -inf masks its expert for that token. Slots for which no expert is left are -1, with weight 0; a row of
    only -inf goes nowhere. A row with a NaN or +inf has weights of NaN, so that the fault stays visible.

    Contract: local, deterministic; differentiable through ``topk_weights``.

    Args:
        logits: ``[T, E]`` floating point; the softmax is computed in float32 (float64 logits: float64).
        top_k: Choices per token, K <= E.
        normalize: Divide a token's weights by their sum.

    Returns:
        Routing: ``topk_idx`` ``[T, K]`` int64, best first, and ``topk_weights`` ``[T, K]`` float32.

    Raises:
        ShapeError: ``logits`` is not a floating-point ``[T, E]`` tensor.
        ConfigError: ``top_k`` is not in 1..E.

    Example:
        >>> import torch
        >>> from tokenferry.nn import softmax_topk
        >>> softmax_topk(torch.tensor([[0.0, 2.0, 0.0]]), top_k=2).topk_idx
        tensor([[1, 0]])
    """
    num_experts = _num_experts("softmax_topk", logits)
    _in_range("softmax_topk", "top_k", top_k, num_experts)
    masked = logits.detach() == -torch.inf
    # The softmax of a row of only -inf would be NaN, also in backward. Its slots are all dropped, whatever it is.
    scores = _wide(logits).masked_fill(masked.all(dim=-1, keepdim=True), 0.0).softmax(dim=-1)
    topk_idx, weights = _chosen(scores, scores.detach().masked_fill(masked, -torch.inf), top_k)
    if normalize:
        weights = weights / _divisor(weights)
    return Routing(topk_idx, weights.float())


def group_limited_topk(
    logits: Tensor,
    top_k: int,
    limit: GroupLimit,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    normalize: bool = True,
) -> Routing:
    """Choose experts from few groups only, with sigmoid scores and a bias that steers the choice but not the weights.

    The gating of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2, and its released model): an expert's score is
    ``sigmoid(logit)``; for choosing, ``bias`` is added. A group of E / num_groups neighbours is scored by the sum of
    its two best biased scores (the paper's K / top_groups, which is two there); the best ``top_groups`` groups stay,
    and from these the ``top_k`` best biased scores are chosen. Weights are the scores without bias, divided by their
    sum, times ``scale``. Ties go to the lower index. With one group per node, a token visits at most ``top_groups``
    nodes: the ``MoeShape.max_nodes`` of the group that sends it.

    A logit or a bias of -inf masks an expert, as in `softmax_topk`; it adds 0 to the score of its group, and a group
    without other experts is chosen last. A NaN in a row stays visible as weights of NaN.

    Contract: local, deterministic; differentiable through ``topk_weights``.

    Args:
        logits: ``[T, E]`` floating point; scores are computed in float32 (float64 logits: float64).
        top_k: Choices per token, K <= top_groups * E / num_groups.
        limit: The number of groups, and how many of them a token may use; ``GroupLimit(1, 1)`` for no limit.
        bias: ``[E]`` floating point, or None; it gets no gradient.
        scale: The sum of a token's weights, or what they are multiplied by without ``normalize``.
        normalize: Divide a token's weights by their sum, before ``scale``.

    Returns:
        Routing: ``topk_idx`` ``[T, K]`` int64, best biased score first, and ``topk_weights`` ``[T, K]`` float32.

    Raises:
        ShapeError: ``logits`` is not a floating-point ``[T, E]`` tensor, or ``bias`` is not ``[E]``.
        ConfigError: ``top_k`` is out of range, or ``num_groups`` does not divide E.

    Example:
        >>> import torch
        >>> from tokenferry.nn import GroupLimit, group_limited_topk
        >>> logits = torch.tensor([[9.0, 0.0, 3.0, 3.0]])  # one good expert, and one good group
        >>> group_limited_topk(logits, top_k=2, limit=GroupLimit(num_groups=2, top_groups=1)).topk_idx
        tensor([[2, 3]])
    """
    call = "group_limited_topk"
    num_experts, num_groups, top_groups = _num_experts(call, logits), limit.num_groups, limit.top_groups
    width = _group_width(call, num_experts, limit)
    _in_range(call, "top_k", top_k, top_groups * width, _why_no_more(num_experts, limit))
    if bias is not None and bias.shape != (num_experts,):
        raise ShapeError(f"{call}: bias: expected [E] = [{num_experts}], got {list(bias.shape)}; one number per expert")
    scores = _wide(logits).sigmoid()
    choice = scores.detach() if bias is None else scores.detach() + bias.detach().to(scores.dtype)
    choice = choice.masked_fill(logits.detach() == -torch.inf, -torch.inf)
    if top_groups < num_groups:
        grouped = choice.view(-1, num_groups, width)
        best = grouped.sort(dim=-1, descending=True).values[..., :_SCORES_PER_GROUP]
        masked = best == -torch.inf
        value = best.masked_fill(masked, 0.0).sum(dim=-1).masked_fill(masked.all(dim=-1), -torch.inf)
        kept = torch.zeros_like(value, dtype=torch.bool).scatter_(1, _largest(value, top_groups), True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1)
    topk_idx, weights = _chosen(scores, choice, top_k)
    if normalize:
        weights = weights / _divisor(weights)
    return Routing(topk_idx, (weights * scale).float())


class Router(nn.Module):
    """A linear layer with a gating function, which choose the experts of each token and their weights.

    Contract:
        Local; differentiable. Every rank holds a copy: average its gradient over the ranks, as a replicated parameter.
        Computes in float32 (float64 rows: float64), whatever the dtype of the rows and of the weight, and even under
            torch.autocast, in backward too. `torch.set_float32_matmul_precision` applies, as to all float32 products.
        Made in float32, whatever torch's default dtype, on torch's default device; `.to()` moves it, and casts it but
            for its bias. A seed gives the same bits on every device.

    Args:
        hidden: Hidden size, H.
        num_experts: Number of experts, E.
        top_k: Choices per token, K.
        group_limit: The limit of `group_limited_topk`, with a bias per expert; None to use `softmax_topk`.
        scale: The sum of a token's weights, if they are normalised, else a factor (`group_limited_topk` only).
        options: Auxiliary losses, capacity, and whether weights are normalised; None: `RouterOptions` as they are by
            default. With ``top_k=1`` normalised weights are the same whatever the router computes, so that it learns
            nothing from the task: a warning says so, unless there are auxiliary losses.
        seed: Seed of the weight, in 0 .. 2^40 - 1; the same on every rank.

    Attributes:
        weight: ``[E, H]`` float32 parameter.
        bias: ``[E]`` float32 buffer, initially zero, or None with softmax; `update_bias` changes it, gradients do not.
            It stays float32 if the router is cast to a narrower dtype, in which small steps would be lost.
        losses: The auxiliary losses of the last forward, with their graph; `auxiliary_losses` takes them. None before
            it, and without ``RouterOptions.losses``. With sigmoid scores, probabilities are the scores divided by their
            sum, as in the sequence-wise loss of DeepSeek-V3. A copy of the router does not have them.
        dropped: int64 scalar: slots that the last forward dropped for lack of capacity; None without a capacity, and
            before the first forward.

    Raises:
        ConfigError: a size is not positive, ``top_k`` is more than a token may choose, ``group_limit`` does not divide
            E, ``scale`` is given with softmax, ``seed`` is out of range, or ``options`` are those of a layer.

    Example:
        >>> import torch
        >>> from tokenferry.nn import GroupLimit, Router
        >>> router = Router(hidden=8, num_experts=16, top_k=4, group_limit=GroupLimit(4, 2), scale=2.5)
        >>> routing = router(torch.randn(3, 8))
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
        group_limit: GroupLimit | None = None,
        scale: float = 1.0,
        options: RouterOptions | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_size("Router", "hidden", hidden)
        _check_size("Router", "num_experts", num_experts)
        if group_limit is not None and not isinstance(group_limit, GroupLimit):
            got = type(group_limit).__name__
            raise ConfigError(f"Router: group_limit: expected a tokenferry.nn.GroupLimit or None, got {got}")
        most, why = num_experts, ""
        if group_limit is not None:
            most = group_limit.top_groups * _group_width("Router", num_experts, group_limit)
            why = _why_no_more(num_experts, group_limit)
        _in_range("Router", "top_k", top_k, most, why)
        if group_limit is None and scale != 1.0:
            raise ConfigError(
                f"Router: scale={scale} needs group_limit, e.g. GroupLimit(1, 1); softmax weights are not scaled"
            )
        if options is not None and not isinstance(options, RouterOptions):
            raise ConfigError(f"Router: options: expected a RouterOptions or None, got {type(options).__name__}")
        self.top_k = top_k
        self.group_limit = group_limit
        self.scale = scale
        self.options = RouterOptions() if options is None else options
        self._warn_of_constant_weights(num_experts)
        self.seed = seed
        self.losses: RouterLosses | None = None
        self.dropped: Tensor | None = None
        device = torch.get_default_device()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, dtype=torch.float32, device=device))
        bias = None if group_limit is None else torch.empty(num_experts, dtype=torch.float32, device=device)
        self.register_buffer("bias", bias)
        self.reset_parameters()

    def _warn_of_constant_weights(self, num_experts: int) -> None:
        if self.top_k == 1 < num_experts and self.options.normalize and not self.options.losses:
            warnings.warn(
                "Router: top_k=1 with weights that are divided by their sum: each weight is the same whatever the "
                "router computes, so that training has no gradient for it; pass Router(..., "
                "options=RouterOptions(normalize=False)), to a layer as MoELayer(..., router=Router(...))",
                stacklevel=3,
            )

    def reset_parameters(self) -> None:
        """Initialise the weight from the seed, and set the bias to 0: the router as it was made.

        Contract: local, also if FSDP2 has sharded the weight. If torch's ``parametrize`` computes it, the original is
            initialised.

        Raises:
            ConfigError: the weight is computed from several tensors, or no longer exists. Nothing was initialised.
        """
        weight, source = initialised_tensor(self, "weight"), generator("Router", self.seed, ROUTER_STREAM)
        num_experts, hidden = weight.shape
        fill(weight, normal(source, num_experts, hidden) * hidden**-0.5)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Routing:
        """Choose the experts of each token; see `softmax_topk` and `group_limited_topk`.

        Contract: local; differentiable, by the weights of the routing. Sets ``losses`` and ``dropped``.

        Args:
            x: ``[T, H]`` of any dtype; float64 is computed in float64, all others in float32.

        Returns:
            Routing: ``topk_idx`` ``[T, K]`` int64, and ``topk_weights`` ``[T, K]`` float32.

        Raises:
            RuntimeError: torch's, for rows of another width than H, or on another device than the weight.
        """
        rows = _wide(x)
        logits = product(rows, self.weight.to(rows.dtype).T)
        if self.group_limit is None:
            routing = softmax_topk(logits, self.top_k, normalize=self.options.normalize)
        else:
            routing = group_limited_topk(
                logits,
                self.top_k,
                self.group_limit,
                bias=self.bias,
                scale=self.scale,
                normalize=self.options.normalize,
            )
        # A checkpointed part is repeated in backward: it must compute the same, but what nobody asks for would only
        # keep its activations alive.
        keep = not recomputing()
        if self.options.losses:
            losses = RouterLosses(load_balance_loss(self._probabilities(logits), routing.topk_idx), z_loss(logits))
            self.losses = losses if keep else self.losses
        if self.options.capacity_factor is not None:
            kept = limited(routing, logits.shape[1], self.options.capacity_factor)
            routing, self.dropped = kept.routing, kept.dropped
        return routing

    def _probabilities(self, logits: Tensor) -> Tensor:
        if self.group_limit is None:
            masked = (logits.detach() == -torch.inf).all(dim=1, keepdim=True)
            return logits.masked_fill(masked, 0.0).softmax(dim=1)
        scores = logits.sigmoid()
        return scores / _divisor(scores)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        bias = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if bias is not None and self.bias is not None and self.bias.dtype in NARROW:
            self.bias = bias.to(self.bias.device, torch.float32)  # its steps would be lost
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - torch's
        super()._load_from_state_dict(*args, **kwargs)
        self._keep_wide()

    def _keep_wide(self) -> None:
        """Make the bias float32 if it has become narrower, as by ``load_state_dict(assign=True)``."""
        if self.bias is not None and self.bias.dtype in NARROW:
            self.bias = self.bias.float()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: not the losses, since torch copies no tensor with a graph."""
        return {**self.__dict__, "losses": None}

    @torch.no_grad()
    def update_bias(self, expert_counts: Tensor, *, rate: float = 0.001) -> None:
        """Make overloaded experts less likely, and underused ones more likely, without an auxiliary loss.

        The rule of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): after a step, an expert's bias falls by ``rate`` if
        its load was above the mean, and rises by ``rate`` if it was below.

        Contract: local. Every rank must pass the same counts, or the copies drift apart.

        Args:
            expert_counts: ``[E]``: tokens that each expert received from *all* ranks: every rank's
                `MoELayer.expert_counts`, concatenated in rank order (an all-gather), added up over the steps since the
                last update. `update_biases` collects them.
            rate: Step size: gamma of the paper, which uses 0.001.

        Raises:
            ConfigError: the router has no bias, because its gating is softmax.
            ShapeError: ``expert_counts`` is not ``[E]``.
        """
        if self.bias is None:
            raise ConfigError(
                "update_bias: this router has no bias; make it with Router(..., group_limit=GroupLimit(1, 1))"
            )
        if expert_counts.shape != self.bias.shape:
            raise ShapeError(
                f"update_bias: expert_counts: expected [E] = {list(self.bias.shape)}, got {list(expert_counts.shape)}; "
                "gather the counts of all ranks"
            )
        self._keep_wide()
        counts = expert_counts.to(self.bias.device, torch.float64)
        self.bias += rate * torch.sign(counts.mean() - counts).to(self.bias.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` largest of each row; ties in order, which `torch.topk` does not guarantee."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count].contiguous()


def _chosen(scores: Tensor, choice: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the best of each row by ``choice``, and their ``scores``; -1 and 0 where ``choice`` is -inf."""
    topk_idx = _largest(choice, top_k)
    nothing = choice.gather(1, topk_idx) == -torch.inf
    return topk_idx.masked_fill(nothing, -1), scores.gather(1, topk_idx).masked_fill(nothing, 0.0)


def _divisor(weights: Tensor) -> Tensor:
    """Return the sum of each row, or a small number: all weights may be 0, or underflow to it."""
    return weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def _num_experts(call: str, logits: Tensor) -> int:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ShapeError(
            f"{call}: logits: expected floating point [T, E], got {logits.dtype} {list(logits.shape)}; "
            "reshape to one row per token"
        )
    return logits.shape[1]


def _group_width(call: str, num_experts: int, limit: GroupLimit) -> int:
    """Return the experts of a group."""
    if num_experts % limit.num_groups:
        raise ConfigError(f"{call}: num_groups={limit.num_groups} does not divide E={num_experts}; use a divisor of E")
    return num_experts // limit.num_groups


def _check_size(call: str, name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{call}: {name}: expected a positive integer, got {value!r}")


def _why_no_more(num_experts: int, limit: GroupLimit) -> str:
    """Return why a token may choose no more experts, for messages; empty if the groups do not limit it."""
    if limit.top_groups == limit.num_groups:
        return ""
    open_experts = limit.top_groups * (num_experts // limit.num_groups)
    return (
        f": {limit.top_groups} of {limit.num_groups} groups have {open_experts} of the {num_experts} experts; choose "
        "fewer experts, or allow more groups"
    )


def _in_range(call: str, name: str, value: int, high: int, why: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
        raise ConfigError(f"{call}: {name}: expected 1 .. {high}, got {value!r}{why}")
