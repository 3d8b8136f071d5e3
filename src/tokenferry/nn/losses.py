"""Auxiliary losses, which keep routers balanced and their logits small: values to be added to the loss of a rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RouterLosses:
    """The auxiliary losses of a router for the tokens of this rank, or their sums over routers.

    Add them, times a weight of your own, to the loss of the rank. As for any loss, gradients are then those of the mean
    over ranks: here of the ranks' values, each of which is computed from its own tokens.

    Attributes:
        balance: `load_balance_loss`, a scalar.
        z: `z_loss`, a scalar.
    """

    balance: Tensor
    z: Tensor


def load_balance_loss(probabilities: Tensor, topk_idx: Tensor) -> Tensor:
    """Return ``E * sum_e f_e * P_e``: 1 if the load is balanced, up to E / K if it is not.

    The loss of GShard (arXiv 2006.16668, section 2.2) and, in this form, of the Switch Transformer (arXiv 2101.03961,
    section 2.2): f_e is the part of the choices that fell on expert e, P_e the mean of its probability over the tokens.
    The choices have no gradient, the probabilities have. Tokens without a choice do not count; with no token the loss
    is 0.

    Contract: local; differentiable through ``probabilities``.

    Args:
        probabilities: ``[T, E]`` floating point; the rows add up to 1.
        topk_idx: ``[T, K]`` integers in ``[-1, E)``: the choices, before any is dropped.

    Returns:
        Tensor: a scalar of the dtype of ``probabilities``.

    Example:
        >>> import torch
        >>> from tokenferry.nn import load_balance_loss
        >>> load_balance_loss(torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0], [0]])).item()
        1.399999976158142
    """
    num_experts, dtype = probabilities.shape[1], probabilities.dtype
    wide = torch.promote_types(dtype, torch.float32)  # narrow ones cannot count as far as there are tokens
    chosen = topk_idx >= 0
    counts = torch.zeros(num_experts, dtype=wide, device=probabilities.device)
    counts = counts.scatter_add(0, topk_idx.clamp_min(0).flatten().long(), chosen.flatten().to(wide))
    used = chosen.any(dim=1, keepdim=True)
    mean = probabilities.masked_fill(~used, 0.0).sum(dim=0, dtype=wide) / used.sum().clamp_min(1)
    return (num_experts * (counts / counts.sum().clamp_min(1) * mean).sum()).to(dtype)


def z_loss(logits: Tensor) -> Tensor:
    """Return the mean over tokens of ``log(sum_e exp(logit_e))^2``, which keeps logits small.

    The router z-loss of ST-MoE (arXiv 2202.08906, section 3.3). A token whose logits are all -inf does not count; with
    no token the loss is 0.

    Contract: local; differentiable.

    Args:
        logits: ``[T, E]`` floating point.

    Returns:
        Tensor: a scalar of the dtype of ``logits``.

    Example:
        >>> import torch
        >>> from tokenferry.nn import z_loss
        >>> z_loss(torch.zeros(3, 1) + 2.0).item()
        4.0
    """
    dtype = logits.dtype
    wide = torch.promote_types(dtype, torch.float32)  # the sum over many tokens may be more than narrow ones hold
    masked = (logits.detach() == -torch.inf).all(dim=1)
    sums = logits.masked_fill(masked.unsqueeze(1), 0.0).to(wide).logsumexp(dim=1).masked_fill(masked, 0.0)
    return (sums.square().sum() / (~masked).sum().clamp_min(1)).to(dtype)
