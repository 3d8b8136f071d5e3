"""The demo's model: a small byte-level transformer whose feed-forward layers are mixtures of experts.

The model is independent of ranks: its caller provides the mixtures, which are sharded over ranks or local.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn

NUM_BYTES = 256


class Block(nn.Module):
    """Causal self-attention, then a mixture of experts, each with a residual connection."""

    def __init__(self, hidden: int, heads: int, moe: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(hidden, dtype=torch.float32, device="cpu")
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False, dtype=torch.float32, device="cpu")
        self.out = nn.Linear(hidden, hidden, bias=False, dtype=torch.float32, device="cpu")
        self.norm_moe = nn.LayerNorm(hidden, dtype=torch.float32, device="cpu")
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, context, H]`` to the same shape."""
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attention.transpose(1, 2).flatten(2))
        mixed: Tensor = self.moe(self.norm_moe(x))
        return x + mixed


class ByteTransformer(nn.Module):
    """Predicts the next byte at each position.

    Args:
        hidden: H.
        context: The maximum number of bytes in a sequence.
        heads: The number of attention heads, a divisor of H.
        layers: The number of blocks.
        make_moe: Returns the mixture of block 0, 1, ...: a module ``[..., H] -> [..., H]``.
        seed: The seed of all parameters but those of the mixtures, which have their own.
    """

    def __init__(
        self, hidden: int, context: int, heads: int, layers: int, make_moe: Callable[[int], nn.Module], seed: int
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(NUM_BYTES, hidden, dtype=torch.float32, device="cpu")
            self.position = nn.Embedding(context, hidden, dtype=torch.float32, device="cpu")
            self.blocks = nn.ModuleList(Block(hidden, heads, make_moe(i)) for i in range(layers))
            self.norm = nn.LayerNorm(hidden, dtype=torch.float32, device="cpu")
            self.head = nn.Linear(hidden, NUM_BYTES, bias=False, dtype=torch.float32, device="cpu")

    def forward(self, text: Tensor) -> Tensor:
        """Map ``[batch, context]`` int64 bytes to ``[batch, context, 256]`` logits of the next byte."""
        x = self.embed(text) + self.position.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
