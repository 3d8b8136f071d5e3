"""Routings without the experts of masked ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def drop_ranks(topk_idx: Tensor, ranks: frozenset[int], num_local: int) -> Tensor:
    """Return ``topk_idx`` ``[T, K]`` with -1 for the experts of ``ranks``; itself if there are none. On any device."""
    for rank in ranks:
        topk_idx = torch.where(topk_idx // num_local == rank, -1, topk_idx)
    return topk_idx
