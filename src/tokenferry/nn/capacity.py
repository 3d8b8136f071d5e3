"""A limit of the choices that may fall on an expert; those beyond it are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from tokenferry.types import Routing


@dataclass(frozen=True, slots=True, eq=False)
class Limited:
    """What is left of a routing.

    Attributes:
        routing: The routing; dropped slots are -1, with weight 0.
        dropped: int64 scalar: slots that were dropped.
    """

    routing: Routing
    dropped: Tensor


def limited(routing: Routing, num_experts: int, factor: float) -> Limited:
    """Let each expert keep at most ``factor * T * K / E`` of the choices of these tokens, rounded up.

    As in GShard (arXiv 2006.16668, algorithm 1) first choices come before second ones, and then earlier tokens before
    later ones. Weights that stay are not changed. Local, deterministic; differentiable through the weights.
    """
    num_tokens, top_k = routing.topk_idx.shape
    choices = routing.topk_idx.T.reshape(-1)
    ordered, order = choices.sort(stable=True)
    places = torch.arange(num_tokens * top_k, dtype=torch.int64, device=choices.device)
    place = torch.empty_like(places).scatter(0, order, places - torch.searchsorted(ordered, ordered))
    # In integers: 1.1 * 100 is more than 110, and a float would be compared in torch's default dtype.
    parts, whole = Fraction(str(factor)).as_integer_ratio()
    most = min(-(-parts * num_tokens * top_k // (whole * num_experts)), num_tokens * top_k)
    late = (place >= most) & (choices >= 0)
    dropped = late.view(top_k, num_tokens).T
    weights = routing.topk_weights
    kept = Routing(
        routing.topk_idx.masked_fill(dropped, -1).contiguous(),
        None if weights is None else weights.masked_fill(dropped, 0.0).contiguous(),
    )
    return Limited(kept, dropped.sum())
