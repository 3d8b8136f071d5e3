"""Codes of dtypes that are the same on all ranks, whatever their versions of torch."""

from __future__ import annotations

import zlib

import torch


def dtype_code(dtype: torch.dtype) -> int:
    """Return the code of a dtype, which is the same on all ranks."""
    return zlib.crc32(str(dtype).encode())


def dtype_name(code: int) -> str:
    """Return the name of the dtype with this `dtype_code`."""
    dtypes = [d for d in vars(torch).values() if isinstance(d, torch.dtype)]
    return next((str(d) for d in dtypes if dtype_code(d) == code), f"unknown dtype {code}")
