"""`HybridEPBuffer` under its module path in DeepEP's hybrid branch, and the function beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenferry.ambient import not_compiled
from tokenferry.checks import INDICES, Checks
from tokenferry.compat.deep_ep.arguments import check_integer
from tokenferry.compat.deep_ep.hybrid import HybridEPBuffer
from tokenferry.compat.deep_ep.hybrid_calls import map_of, spread

__all__ = ["HybridEPBuffer", "indices_to_map"]


@not_compiled
def indices_to_map(
    topk_idx: Tensor, topk_weights: Tensor | None, num_of_tokens: int, num_of_experts: int
) -> tuple[Tensor, Tensor | None]:
    """Return the experts of each token as a map, and their weights likewise, as `HybridEPBuffer` takes them. Local.

    Contract: the host does not wait for a GPU. Differentiable in the weights.

    Args:
        topk_idx: ``[T, K]`` int64 or int32 in ``[-1, E)``; -1: no expert.
        topk_weights: ``[T, K]`` float32, or None.
        num_of_tokens: T.
        num_of_experts: E.

    Returns:
        (``[T, E]`` bool: whether a token has chosen an expert; ``[T, E]`` float32: with which weight, the sum if it
        has chosen it more than once, 0 for others; or None).

    Raises:
        ArgumentError: a number is not an integer, or out of range.
        ShapeError: a tensor is wrong; names it.
        RoutingError: on the CPU, an expert is out of range. On a GPU that is undefined behaviour, as in DeepEP.
    """
    call = "indices_to_map"
    check_integer(call, "num_of_tokens", num_of_tokens, 0)
    check_integer(call, "num_of_experts", num_of_experts, 1)
    device = topk_idx.device if isinstance(topk_idx, Tensor) else torch.device("cpu")
    check = Checks(call, device).given("num_of_tokens", T=num_of_tokens)
    check.tensor("topk_idx", topk_idx, "T K", INDICES)
    if topk_idx.device.type == "cpu":
        check.experts("topk_idx", topk_idx, num_of_experts)
    chosen = map_of(topk_idx, num_of_experts)
    if topk_weights is None:
        return chosen, None
    check.tensor("topk_weights", topk_weights, "T K", (torch.float32,))
    return chosen, spread(topk_weights, topk_idx, num_of_experts)
