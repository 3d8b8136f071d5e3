"""Uninitialised tensors in memory of torch, at a third of the cost of `torch.empty`.

`torch.empty` takes longer to understand its arguments than to allocate. The code that torch.compile generates makes its
tensors by functions of three positional arguments instead. They are private to torch, so they serve only versions that
are known to have them; any other version makes the same tensors by its public functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_KNOWN_VERSIONS = ("2.11", "2.12", "2.13", "2.14", "2.15")
_guards: Any = torch._C._dynamo.guards if ".".join(torch.__version__.split(".")[:2]) in _KNOWN_VERSIONS else None

Empty = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]
"""Makes a tensor of a size, with strides and a dtype, on one device."""


class Blank(NamedTuple):
    """The arguments of an `Empty`, worked out before it is called.

    Attributes:
        size: The size.
        strides: The strides, in elements.
        dtype: The dtype.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def contiguous(dtype: torch.dtype, *size: int) -> Blank:
    """Return a contiguous tensor's description."""
    strides, stride = [], 1
    for length in reversed(size):
        strides.append(stride)
        stride *= max(length, 1)
    return Blank(size, tuple(reversed(strides)), dtype)


def empty_on(device: torch.device) -> Empty:
    """Return a function that makes tensors on a device, whichever device is the current one."""

    def slow(size: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, strides, dtype=dtype, device=device)

    if _guards is None or device.type not in ("cpu", "cuda"):
        return slow
    if device.type == "cpu":
        on_cpu: Empty = _guards._empty_strided_cpu
        return on_cpu
    on_current: Empty = _guards._empty_strided_cuda
    current, index = torch._C._cuda_getDevice, device.index

    def on_cuda(size: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return on_current(size, strides, dtype) if current() == index else slow(size, strides, dtype)

    return on_cuda


def part_of(tensor: Tensor, start: int, size: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Return a part of a tensor whose storage begins where it does; ``start``: its first element.

    It is no view for autograd, and in-place changes of it do not count as changes of the tensor.
    """
    if _guards is None or torch.is_inference_mode_enabled() is not tensor.is_inference():
        return tensor.as_strided(size, strides, start)
    part: Tensor = _guards._reinterpret_tensor(tensor, size, strides, start)
    return part
