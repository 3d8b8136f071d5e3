"""Operations on tensors that both backends need."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_T = TypeVar("_T")


def without_autocast(call: Callable[_P, _T]) -> Callable[_P, _T]:
    """Run a function on CPU tensors outside of torch.autocast, which would refuse to join float16 rows."""

    @wraps(call)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if not torch.is_autocast_enabled("cpu"):
            return call(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return call(*args, **kwargs)

    return run


def drop_ranks(topk_idx: Tensor, ranks: frozenset[int], num_local: int) -> Tensor:
    """Return ``topk_idx`` ``[T, K]`` with -1 for the experts of ``ranks``; itself if there are none. On any device."""
    for rank in ranks:
        topk_idx = torch.where(topk_idx // num_local == rank, -1, topk_idx)
    return topk_idx


def overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors share a storage, and so may overlap."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
