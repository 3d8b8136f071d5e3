"""Helpers for all calls of `Buffer`: convert rows, and reject arguments that cannot be honoured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tokenferry.checks import FLOATS, check_dense, stands_for_others
from tokenferry.compat.deep_ep.config import Config
from tokenferry.errors import ArgumentError, ShapeError, UnsupportedError
from tokenferry.types import MAX_SIZE, Quantized

MOST_BYTES = 2**63 - 1
"""The most bytes that an argument can ask for."""

Rows = Tensor | tuple[Tensor, Tensor]
"""The type of DeepEP's ``x``: rows, or (rows, scales)."""


def check_config(call: str, config: object) -> None:
    """Raise ArgumentError unless ``config`` is a Config or None; only its ``num_sms`` has an effect."""
    if config is not None and not isinstance(config, Config):
        raise ArgumentError(f"{call}: config: expected a Config or None, got {type(config).__name__}; see Config")


def refuse(call: str, remedy: str, **arguments: object) -> None:
    """Reject every argument that does not have a neutral value (None, False or 0).

    Raises:
        UnsupportedError: names the argument, its value and the remedy.
    """
    for name, value in arguments.items():
        if value is None or value is False:  # as nearly always
            continue
        if isinstance(value, Tensor) or value != 0:
            got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise UnsupportedError(f"{call}: {name}: got {got}, which tokenferry cannot honour; {remedy}")


def detached(tensor: Tensor) -> Tensor:
    """Return the tensor, or without its graph if it has one, or is a subclass such as a Parameter."""
    if type(tensor) is Tensor and not tensor.requires_grad:  # as nearly always
        return tensor
    if not isinstance(tensor, Tensor) or stands_for_others(tensor):
        return tensor  # the call says what is wrong with it
    return tensor.detach()


def to_native(call: str, x: object, name: str = "x") -> tuple[Tensor | Quantized, int]:
    """Return rows for a native call, and the number of dimensions of their scales; 0: they have none.

    Floating-point rows stay as they are; (rows, scales) and rows of any other dtype become `Quantized`.

    Args:
        call: The method that was called, for errors.
        x: The rows.
        name: What the method calls them.

    Raises:
        ShapeError: ``x`` is neither rows nor (rows, scales), or they are not dense.
    """
    if isinstance(x, Tensor) and x.ndim == 2 and x.dtype in FLOATS and not x.is_nested:  # as nearly always
        return detached(x), 0
    data: Any = x
    scale: Any = None
    is_pair = isinstance(x, tuple) and len(x) == 2
    if is_pair:
        data, scale = data
    if not isinstance(data, Tensor) or data.ndim != 2 or isinstance(scale, Tensor) is not is_pair:
        bare = isinstance(data, Tensor) and is_pair and scale is None
        remedy = "pass rows without scales as a tensor" if bare else "reshape the rows to two dimensions"
        raise ShapeError(
            f"{call}: {name}: expected a tensor [T, H] or a tuple of rows [T, H] and scales [T, S], got "
            f"{_describe(x)}; {remedy}"
        )
    check_dense(call, name, data)
    if scale is None:
        return Quantized(detached(data), data.new_empty((data.shape[0], 0), dtype=torch.float32)), 0
    check_dense(call, f"{name}[1]", scale)
    scale = detached(scale)
    return Quantized(detached(data), scale.unsqueeze(1) if scale.ndim == 1 else scale), scale.ndim


def from_native(value: Tensor | Quantized, scale_dims: int) -> Rows:
    """Return received rows in the form in which they were sent; scales are contiguous by row.

    Args:
        value: The rows.
        scale_dims: The number of dimensions of the scales that were sent, as `to_native` returned it: what the caller
            has passed is not looked at again, since other ranks have gone on.
    """
    if isinstance(value, Tensor):
        return value
    if not scale_dims:
        return value.data
    scale = value.scale.contiguous()
    return value.data, scale[:, 0] if scale_dims == 1 else scale


def aligned(counts: Iterable[int], alignment: int) -> list[int]:
    """Return counts of rows, one for each local expert, rounded up to a multiple: there may be hundreds in a call."""
    return list(counts) if alignment == 1 else [count + -count % alignment for count in counts]


def width(rows: Tensor | Quantized) -> int:
    """Return the width of rows: H, or that of packed rows."""
    return (rows.data if isinstance(rows, Quantized) else rows).shape[1]


def height(rows: Tensor | Quantized) -> int:
    """Return the number of rows, T."""
    return (rows.data if isinstance(rows, Quantized) else rows).shape[0]


def _describe(x: Any) -> str:  # noqa: ANN401 - any argument of a user
    if isinstance(x, Tensor):
        return f"{x.dtype} {list(x.shape)}"
    return f"({', '.join(_describe(part) for part in x)})" if isinstance(x, tuple) else type(x).__name__


def check_integer(call: str, name: str, value: object, least: int, most: int = MAX_SIZE) -> None:
    """Raise ArgumentError unless ``value`` is an integer of at least ``least`` and at most ``most``."""
    if type(value) is not int or value < least:
        raise ArgumentError(f"{call}: {name}: expected an integer of at least {least}, got {value!r}")
    if value > most:
        raise ArgumentError(f"{call}: {name}: expected an integer of at most {most}, got {value}")


def check_optional(call: str, **numbers: object) -> None:
    """Raise ArgumentError unless each number, a hint about hardware, is an integer of at least 0 or None."""
    for name, value in numbers.items():
        if value is not None:
            check_integer(call, name, value, 0)


def check_speeds(call: str, **speeds: object) -> None:
    """Raise ArgumentError unless each speed, in GB/s, is a number of at least 0."""
    for name, value in speeds.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
            raise ArgumentError(f"{call}: {name}: expected a number of at least 0, got {value!r}")


def check_alignment(call: str, name: str, alignment: int, num_local: int, most_rows: int) -> None:
    """Raise ArgumentError if the rows of all local experts, each rounded up, may be too many to be counted in 32 bits.

    Args:
        call: The method that was called, for errors.
        name: What the method calls the alignment.
        alignment: A.
        num_local: L.
        most_rows: The most rows of all local experts together, before they are rounded up; 0: not known.
    """
    total = most_rows + (alignment - 1) * num_local
    if alignment > 1 and total > MAX_SIZE:
        most = max(1, 1 + (MAX_SIZE - most_rows) // num_local)
        raise ArgumentError(
            f"{call}: {name}: expected at most {most}, so that the rows of {num_local} experts can be counted in 32 "
            f"bits, got {alignment}, with which there may be {total}"
        )


def check_sizes(call: str, **sizes: object) -> None:
    """Raise ArgumentError unless all sizes are positive integers."""
    for name, value in sizes.items():
        check_integer(call, name, value, 1)
