"""DenseMoE: the result of an expert-parallel layer, from one process that holds all experts, in plain loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from tokenferry.types import Routing


class DenseMoE(nn.Module):
    """The reference for `tokenferry.nn.MoELayer`: the same sum, without a group, a plan or a permutation.

    Products are taken in the dtype of the rows, as in the layer without autocast, and added up in float32 (float64
    rows: float64) with one rounding. It shares no code with what it judges but the router that it is given.

    Args:
        router: Maps ``[T, H]`` to a `Routing` with weights.
        states: The ``state_dict`` of every rank's layer, in rank order; the experts of all are taken over. On several
            ranks its DTensors have to be replaced by this rank's part, ``to_local()``.

    Attributes:
        gate, up: ``[E, H, F]`` parameters.
        down: ``[E, F, H]`` parameter.
        expert_counts: ``[E]`` int64: tokens of each expert in the last forward; None before.

    Example:
        >>> import torch, tokenferry
        >>> from tokenferry.nn import MoELayer
        >>> from tokenferry.testing.dense import DenseMoE
        >>> group = tokenferry.ExpertGroup(None, tokenferry.MoeShape(num_experts=4, top_k=2, hidden=8, max_tokens=64))
        >>> layer, x = MoELayer(group, ffn_hidden=16), torch.randn(5, 8)
        >>> dense = DenseMoE(layer.router, [layer.state_dict()])
        >>> torch.allclose(layer(x), dense(x), atol=1e-6)
        True
    """

    def __init__(self, router: Callable[[Tensor], Routing], states: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.router = router
        self.gate, self.up, self.down = (
            nn.Parameter(torch.cat([state[f"experts.{name}"] for state in states])) for name in ("gate", "up", "down")
        )
        self.expert_counts: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Send each token of ``x`` ``[..., H]`` through its experts, one expert after another."""
        rows = x.reshape(-1, x.shape[-1])
        routing = self.router(rows)
        assert routing.topk_weights is not None
        total = torch.zeros_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
        counts = []
        for expert in range(self.gate.shape[0]):
            chosen = routing.topk_idx == expert
            tokens = chosen.any(dim=1).nonzero()[:, 0]
            weights = torch.where(chosen, routing.topk_weights, 0.0).sum(dim=1)[tokens].to(rows.dtype)
            mine = rows[tokens]
            inner = F.silu(mine @ self.gate[expert]) * (mine @ self.up[expert])
            answer = (inner @ self.down[expert]) * weights.unsqueeze(1)
            total = total.index_add(0, tokens, answer.to(total.dtype))
            counts.append(tokens.numel())
        self.expert_counts = torch.tensor(counts, dtype=torch.int64, device="cpu")
        return total.to(rows.dtype).reshape(x.shape)
