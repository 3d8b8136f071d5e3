"""The demo's model: a small byte-level transformer whose feed-forward layers are mixtures of experts.

It knows nothing of ranks: whoever builds it says what a mixture is, spread over ranks or whole in this process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody knows
from torch import Tensor, nn

NUM_BYTES = 256


class Block(nn.Module):
    """Causal self-attention, then a mixture of experts; both are added to what came in."""

    def __init__(self, hidden: int, heads: int, moe: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.norm_moe = nn.LayerNorm(hidden)
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, context, H]`` -> the same."""
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attention.transpose(1, 2).flatten(2))
        mixed: Tensor = self.moe(self.norm_moe(x))
        return x + mixed


class ByteTransformer(nn.Module):
    """Predicts the next byte of each place.

    Args:
        hidden: H.
        context: Most bytes that it sees at once.
        heads: Attention heads; a divisor of H.
        layers: Blocks.
        make_moe: Gives the mixture of block 0, 1, ...: a module ``[..., H] -> [..., H]``.
        seed: Of every parameter but those of the mixtures, which have their own.
    """

    def __init__(
        self, hidden: int, context: int, heads: int, layers: int, make_moe: Callable[[int], nn.Module], seed: int
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(NUM_BYTES, hidden)
            self.place = nn.Embedding(context, hidden)
            self.blocks = nn.ModuleList(Block(hidden, heads, make_moe(i)) for i in range(layers))
            self.norm = nn.LayerNorm(hidden)
            self.head = nn.Linear(hidden, NUM_BYTES, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """``[batch, context]`` int64 bytes -> ``[batch, context, 256]`` scores of the byte that follows each."""
        x = self.embed(text) + self.place.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x))
        return scores
