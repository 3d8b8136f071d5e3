"""A tensor over memory that somebody else owns, and that keeps its owner alive.

DLPack carries the address. torch copies what DLPack's struct says, but for the deleter, which it looks up when the
storage dies, and that may be after the interpreter has ended. There is nothing to delete: so the deleter is null, and
the struct, which is never freed, serves again for the next tensor. The owner hangs on the Python object of the tensor's
storage, which torch keeps as long as the storage lives, whoever holds that: a view, a saved tensor of autograd, C++
code.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections import deque
from typing import Any

import torch
from torch import Tensor

_MANAGED = struct.Struct("@QiiiBBHQQQQQqqq")
"""DLManagedTensor: data, device type, device index, dimensions, dtype (code, bits, lanes), shape, strides (0: row by
row), offset, context, deleter (64 bytes); then shape[3]."""
_pack = _MANAGED.pack_into
_SHAPE_AT = 64
_KINDS = {"cpu": 1, "cuda": 2}
_NAME = b"dltensor"
_TYPES = {
    torch.uint8: (1, 8),
    torch.int8: (0, 8),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bfloat16: (4, 16),
}
"""What DLPack calls a dtype (code, bits); others travel as bytes and are viewed."""

# Functions of our own: to set restype on those of ctypes.pythonapi would change them for everybody.
_malloc = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(("PyMem_RawMalloc", ctypes.pythonapi))
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_idle: deque[tuple[Any, int]] = deque()
"""Structs, and their addresses, that no thread is filling in: as many as have ever been wanted at once."""


def bytes_at(address: int, num_bytes: int, device: torch.device, owner: object) -> Tensor:
    """Return a uint8 tensor ``[num_bytes]`` over the memory at ``address`` of ``device``; as `tensor_at`."""
    return tensor_at(address, (num_bytes,), torch.uint8, device, owner)


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, owner: object) -> Tensor:
    """Return a contiguous tensor of up to three dimensions over the memory at ``address``; costs about 1 us.

    ``owner`` lives until the last tensor that uses the storage is gone.
    """
    code = _TYPES.get(dtype)
    if code is None:
        wide = (*shape[:-1], shape[-1] * dtype.itemsize)
        return tensor_at(address, wide, torch.uint8, device, owner).view(dtype)
    try:
        managed, at = idle = _idle.pop()
    except IndexError:
        managed, at = idle = _new_struct()
    first, second, third = (*shape, 1, 1)[:3]
    shape_at = at + _SHAPE_AT
    _pack(managed, 0, address, *_place(device), len(shape), *code, 1, shape_at, 0, 0, 0, 0, first, second, third)
    tensor: Tensor = torch._C._from_dlpack(_capsule(at, _NAME, None))
    _idle.append(idle)
    tensor.untyped_storage().tokenferry_owner = owner  # type: ignore[attr-defined]
    return tensor


@functools.lru_cache
def _place(device: torch.device) -> tuple[int, int]:
    return _KINDS[device.type], device.index or 0


def _new_struct() -> tuple[Any, int]:
    at = _malloc(_MANAGED.size)
    return (ctypes.c_char * _MANAGED.size).from_address(at), at
