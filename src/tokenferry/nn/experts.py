"""The SwiGLU experts of a `MoELayer`: their initial weights and their computation."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from tokenferry.nn.seeds import FIRST_EXPERT_STREAM, generator, normal


def draw_expert(seed: int, expert: int, hidden: int, ffn_hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return gate ``[H, F]``, up ``[H, F]`` and down ``[F, H]`` of one expert, drawn in float32 on the CPU.

    The values do not depend on the rank that holds the expert, nor on the dtype of the layer.
    """
    draws = generator("MoELayer", seed, FIRST_EXPERT_STREAM + expert)
    gate = normal(draws, hidden, ffn_hidden) * hidden**-0.5
    up = normal(draws, hidden, ffn_hidden) * hidden**-0.5
    down = normal(draws, ffn_hidden, hidden) * ffn_hidden**-0.5
    return gate, up, down


def swiglu(rows: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return ``(silu(rows @ gate) * (rows @ up)) @ down``, ``[n, H]`` for rows ``[n, H]``."""
    return (F.silu(rows @ gate) * (rows @ up)) @ down
