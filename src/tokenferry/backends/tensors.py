"""Operations on tensors that both backends need."""

from __future__ import annotations

import torch
from torch import Tensor


def drop_ranks(topk_idx: Tensor, ranks: frozenset[int], num_local: int) -> Tensor:
    """Return ``topk_idx`` ``[T, K]`` with -1 for the experts of ``ranks``; itself if there are none. On any device."""
    for rank in ranks:
        topk_idx = torch.where(topk_idx // num_local == rank, -1, topk_idx)
    return topk_idx


def overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors share a storage, and so may overlap."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
