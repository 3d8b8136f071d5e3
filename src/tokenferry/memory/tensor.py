"""Tensors over memory that another object owns; such a tensor keeps the owner alive.

DLPack carries the address. torch copies the contents of DLPack's struct except for the deleter, which it looks up when
the storage is freed; that may be after the interpreter has ended. Nothing needs to be deleted, so the deleter is null,
and the struct, which is never freed, is reused for the next tensor. The owner is an attribute of the Python object of
the tensor's storage, which torch keeps as long as the storage lives, whatever refers to it: a view, a saved tensor of
autograd, C++ code.
"""

from __future__ import annotations

import ctypes
import struct
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MANAGED = struct.Struct("@QiiiBBHQQQQQqqq")
"""DLManagedTensor: data, device type, device index, dimensions, dtype (code, bits, lanes), shape, strides (0:
contiguous), offset, context, deleter (64 bytes); then shape[3]."""
_SHAPE_AT = 64
_SHAPE_WORD = _SHAPE_AT // 8
_DEVICE_TYPES = {"cpu": 1, "cuda": 2}
_NAME = b"dltensor"


class _DlpackType(NamedTuple):
    """DLPack's code and width of a dtype."""

    code: int
    bits: int


_TYPES: dict[torch.dtype, _DlpackType | None] = {
    torch.uint8: _DlpackType(1, 8),
    torch.int8: _DlpackType(0, 8),
    torch.int32: _DlpackType(0, 32),
    torch.int64: _DlpackType(0, 64),
    torch.float16: _DlpackType(2, 16),
    torch.float32: _DlpackType(2, 32),
    torch.float64: _DlpackType(2, 64),
    torch.bfloat16: _DlpackType(4, 16),
}
"""Others are added on first use; None: torch does not accept the type, so that tensors are viewed from bytes."""
_NEWER_TYPES = {torch.float8_e4m3fn: _DlpackType(10, 8), torch.float8_e5m2: _DlpackType(12, 8)}
"""Types that only newer versions of torch accept."""

# Own function objects: setting restype on those of ctypes.pythonapi would change them for the whole process.
_malloc = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(("PyMem_RawMalloc", ctypes.pythonapi))
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_from_dlpack = torch._C._from_dlpack
_Kind = tuple[torch.dtype, torch.device, int]
"""The fields of a struct that never change: dtype, device, number of dimensions."""
_idle: dict[_Kind, deque[tuple[Any, int]]] = {}
"""Structs (as words, with their addresses) that no thread is using, by kind. They are never freed, since torch may
read a struct after the interpreter has ended."""


def bytes_at(address: int, num_bytes: int, device: torch.device, owner: object) -> Tensor:
    """Return a uint8 tensor ``[num_bytes]`` over the memory at ``address``; see `tensor_at`."""
    return tensor_at(address, (num_bytes,), torch.uint8, device, owner)


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, owner: object) -> Tensor:
    """Return a contiguous tensor of up to three dimensions over the memory at ``address``; costs about 1 us.

    ``owner`` lives until the last tensor that uses the storage is gone.
    """
    kind = (dtype, device, len(shape))
    try:
        pool = _idle[kind]
        words, at = idle = pool.pop()
    except (KeyError, IndexError):
        code = _TYPES[dtype] if dtype in _TYPES else _learn(dtype)
        if code is None:
            wide = (*shape[:-1], shape[-1] * dtype.itemsize)
            return tensor_at(address, wide, torch.uint8, device, owner).view(dtype)
        pool = _idle.setdefault(kind, deque())
        words, at = idle = _new_struct(code, device, len(shape))
    words[0] = address
    for i, size in enumerate(shape, _SHAPE_WORD):
        words[i] = size
    tensor: Tensor = _from_dlpack(_capsule(at, _NAME, None))
    pool.append(idle)
    tensor.untyped_storage().tokenferry_owner = owner  # type: ignore[attr-defined]
    return tensor


def _new_struct(code: _DlpackType, device: torch.device, num_dims: int) -> tuple[Any, int]:
    """Return a struct for one byte of a kind of tensor, as words, and its address."""
    at = _malloc(_MANAGED.size)
    raw = (ctypes.c_char * _MANAGED.size).from_address(at)
    place = _DEVICE_TYPES[device.type], device.index or 0
    _MANAGED.pack_into(raw, 0, 0, *place, num_dims, *code, 1, at + _SHAPE_AT, 0, 0, 0, 0, 1, 1, 1)
    return memoryview(raw).cast("B").cast("Q"), at


def _learn(dtype: torch.dtype) -> _DlpackType | None:
    """Return DLPack's type of a dtype if this torch accepts it, else None; store the result in ``_TYPES``."""
    code = _NEWER_TYPES.get(dtype)
    if code is not None:
        words, at = _new_struct(code, torch.device("cpu"), 1)
        words[0] = at  # any readable byte
        try:
            code = code if _from_dlpack(_capsule(at, _NAME, None)).dtype is dtype else None
        except (BufferError, RuntimeError):
            code = None
    _TYPES[dtype] = code
    return code
