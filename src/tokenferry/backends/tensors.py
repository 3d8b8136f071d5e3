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


def may_write_to(out: Tensor, y: Tensor, biases: tuple[Tensor, ...] = ()) -> bool:
    """Return whether sums of rows ``y`` and biases may be written to ``out``, row by row, while these are read.

    All are contiguous; they may lie in one storage, or in several of the same memory. A bias that begins where ``out``
    does is read just before it is overwritten.
    """
    start = out.data_ptr()
    end, at = start + out.nbytes, y.data_ptr()
    if at < end and start < at + y.nbytes:
        return False
    for bias in biases:
        at = bias.data_ptr()
        if at != start and at < end and start < at + bias.nbytes:
            return False
    return True
