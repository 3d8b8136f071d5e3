"""FP8 and logfmt10 on whole tensors, for results that are too large for the loops of the oracle.

Shares no code with `tokenferry.formats`, which it judges. Tests compare it with the oracle. Everything works on the
device of its arguments; H is a multiple of 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.types import Scale

GROUP = 128
"""Columns that share a scale, or a logarithmic range."""

LOG_STEPS = 510
"""Steps of logfmt10 from its least number other than 0 to the largest."""

_FP8_MAX = 448.0
_FP8_NAN = 0x7F
_MIN_AMAX = 1e-4
_MAX_LOG = 127.9999
_LOG_RANGE = 32.0
_ONE_IN = 100
"""One number in so many may be half-way between two codes."""


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """Rows as they arrive.

    Attributes:
        values: ``[..., H]`` float32.
        one_code: ``[..., H]`` or ``[]`` float32: how far the next code is; 0 where every bit counts.
    """

    values: Tensor
    one_code: Tensor


def encode_and_decode(rows: Tensor, encoding: str) -> Decoded:
    """Return bfloat16 rows ``[..., H]`` as they arrive after they travelled in an encoding of `decode_combine`.

    Args:
        rows: Numbers, finite or not.
        encoding: ``"same"``, ``"fp8"`` or ``"logfmt10"``.
    """
    if encoding == "logfmt10":
        return logfmt10(rows)
    values = fp8_values(*fp8_cast(rows)) if encoding == "fp8" else rows.float()
    return Decoded(values, torch.zeros((), device=rows.device, dtype=torch.float32))


def fp8_cast(rows: Tensor, scale: Scale = Scale.FLOAT32) -> tuple[Tensor, Tensor]:
    """Cast ``[..., H]`` to float8_e4m3fn, with scales ``[..., H / 128]`` float32, unpacked also for UE8M0."""
    given = _grouped(rows.float())
    groups = torch.where(given.isfinite(), given, 0.0)
    amax = groups.abs().amax(-1, keepdim=True).clamp(min=_MIN_AMAX)
    # Tensors on both sides: torch divides by a number on GPUs by multiplying with its rounded inverse.
    factor = amax / torch.full_like(amax, _FP8_MAX)
    if scale is Scale.FLOAT32:
        scaled = groups * (_FP8_MAX / amax)
    else:
        mantissa, exponent = torch.frexp(factor)
        factor = power_of_two(exponent - (mantissa == 0.5).int())
        scaled = groups / factor
    codes = scaled.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = torch.where(given.isfinite(), codes, _FP8_NAN)
    return codes.view(torch.float8_e4m3fn).flatten(-2), factor.squeeze(-1)


def fp8_values(data: Tensor, scale: Tensor) -> Tensor:
    """Return ``[..., H]`` float32 of a cast with float32 scales."""
    return (_grouped(data.float()) * scale[..., None]).flatten(-2)


def unpacked(scale: Tensor, num_groups: int) -> Tensor:
    """Return scales ``[..., num_groups]`` as float32, in whichever of the three ways a result stores them."""
    if scale.dtype == torch.float32:
        return scale
    shifts = torch.arange(0, 32, 8, device=scale.device, dtype=torch.int64)
    exponents = (scale[..., None] >> shifts & 255).flatten(-2)[..., :num_groups]
    return power_of_two(exponents - 127)


def logfmt10(rows: Tensor) -> Decoded:
    """Return numbers ``[..., H]`` after they travelled as logfmt10: each the nearest of its group's codes, or NaN."""
    groups = _grouped(rows.double())
    finite = groups.isfinite()
    sizes = torch.where(finite, groups, 0.0).abs()
    hi = sizes.amax(-1, keepdim=True).log2().clamp(max=_MAX_LOG).float()
    least = sizes.masked_fill(sizes == 0, torch.inf).amin(-1, keepdim=True).log2()
    lo = torch.minimum(torch.maximum(least, hi.double() - _LOG_RANGE).float(), hi)
    step = (hi - lo) / torch.full_like(hi, LOG_STEPS)  # as in `fp8_cast`

    def value(number: Tensor) -> Tensor:
        return torch.exp2(lo.double() + step.double() * number)

    below = ((sizes.log2() - lo) / step).floor().nan_to_num(nan=0.0).clamp(0, LOG_STEPS - 1)
    # Logarithms differ in their last bits: the nearest is looked for on both sides.
    near = torch.stack([value((below + i).clamp(0, LOG_STEPS)) for i in (-1, 0, 1, 2)])
    nearest = near.gather(0, (near - sizes).abs().argmin(0, keepdim=True)).squeeze(0)
    nearest = torch.where(2 * sizes < value(torch.zeros_like(below)), 0.0, nearest)
    one_code = nearest * (torch.exp2(step.double()) - 1)
    only_zeros = sizes.amax(-1, keepdim=True) == 0
    nearest, one_code = (torch.where(only_zeros, 0.0, one) for one in (nearest, one_code))
    # Where something is not finite, NaN takes the place of the negative zero.
    signed = torch.where(finite.all(-1, keepdim=True) | (nearest > 0), torch.copysign(nearest, groups), 0.0)
    values = torch.where(finite, signed, torch.nan)
    return Decoded(values.float().flatten(-2), one_code.float().flatten(-2))


def beyond_a_code(got: Tensor, want: Tensor, magnitude: Tensor, one_code: Tensor) -> Tensor:
    """Return where sums over logfmt10 are wrong, bool; does not wait for the device. Any NaN equals any NaN.

    A number half-way between two codes takes either, since logarithms differ in their last bits. Few numbers are: if
    more than one in a hundred takes the other code, all of these are wrong.

    Args:
        got: The sums to judge.
        want: The sums as they should be, in the dtype of ``got``.
        magnitude: Float32: the magnitudes that were added.
        one_code: Float32: by how much each sum changes if each of its numbers gets the next code.
    """
    off = (got.float() - want.float()).abs()
    rounding = magnitude * 2.0**-16 + want.float().abs() * torch.finfo(want.dtype).eps
    other_code = ~((off <= rounding) | (got.isnan() & want.isnan()))
    few = other_code.sum() <= max(2, other_code.numel() // _ONE_IN)
    return other_code & ~((off <= rounding + 1.01 * one_code) & few)


def power_of_two(exponent: Tensor) -> Tensor:
    """Return 2^exponent as float32, from its bits: exact, unlike exp2."""
    return (exponent.int() + 127 << 23).view(torch.float32)


def _grouped(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
