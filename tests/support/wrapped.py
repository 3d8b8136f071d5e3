"""Tensors whose classes stand for others, and have no memory of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate


class Wrapped(Tensor):
    """A tensor in place of another, which knows no operator."""

    @staticmethod
    def __new__(cls, whole: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype, device=whole.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented

    def __repr__(self) -> str:
        return "Wrapped()"


class Mine(Tensor):
    """A tensor with memory, whose class changes nothing."""


@contextmanager
def distributed() -> Iterator[type[DTensor]]:
    """Yields a function that makes a DTensor on one rank, as long as the block runs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield lambda whole: DTensor.from_local(whole, mesh, [Replicate()])
    finally:
        dist.destroy_process_group()
