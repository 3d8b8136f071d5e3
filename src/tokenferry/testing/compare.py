"""Comparisons whose errors name the first difference of two tensors: of bits, or beyond a tolerance."""

from __future__ import annotations

import torch
from torch import Tensor

_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(what: str, got: Tensor, want: Tensor) -> None:
    """Assert that two tensors have the same dtype, shape and bits, wherever each of them is; any NaN equals any NaN.

    The bits of a NaN are not defined: processors differ in those that they make.

    Raises:
        AssertionError: names ``what``, the first place that differs, how many do, and both values.
    """
    assert isinstance(got, Tensor), f"{what}: got {type(got).__name__} instead of a tensor"
    assert got.dtype == want.dtype, f"{what}: got {got.dtype}, want {want.dtype}"
    assert got.shape == want.shape, f"{what}: got shape {list(got.shape)}, want {list(want.shape)}"
    got, want = got.detach().cpu(), want.detach().cpu()
    differ = _bits(got) != _bits(want)
    if got.is_floating_point() and got.element_size() > 1 and bool(differ.any()):
        differ &= ~(got.isnan() & want.isnan())
    _report(what, differ, got, want)


def close(what: str, got: Tensor, want: Tensor, *, rtol: float, atol: float) -> None:
    """Assert that two tensors of one shape differ by at most ``atol + rtol * |want|`` everywhere; NaN is never close.

    Raises:
        AssertionError: as `same_bits`.
    """
    assert got.shape == want.shape, f"{what}: got shape {list(got.shape)}, want {list(want.shape)}"
    got, want = got.detach().cpu(), want.detach().cpu()
    far = ~((got.double() - want.double()).abs() <= atol + rtol * want.double().abs())
    _report(f"{what} ({rtol=}, {atol=})", far, got, want)


def close_each(what: str, got: Tensor, want: Tensor, bound: Tensor) -> None:
    """Assert that two tensors of one shape differ nowhere by more than ``bound`` ``[...]``; any NaN equals any NaN.

    Raises:
        AssertionError: as `same_bits`.
    """
    assert got.shape == want.shape, f"{what}: got shape {list(got.shape)}, want {list(want.shape)}"
    got, want = got.detach().cpu(), want.detach().cpu()
    near = (got.double() - want.double()).abs() <= bound.double()
    same = (got == want) | (got.isnan() & want.isnan())  # infinities may be equal
    _report(what, ~near & ~same, got, want)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_INTS[tensor.element_size()])


def _report(what: str, differ: Tensor, got: Tensor, want: Tensor) -> None:
    if not bool(differ.any()):
        return
    place = tuple(differ.nonzero()[0].tolist())
    raise AssertionError(
        f"{what}: {int(differ.sum())} of {differ.numel()} values differ, the first at {list(place)}: "
        f"got {got[place].item()}, want {want[place].item()}"
    )
