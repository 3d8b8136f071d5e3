"""FP8 rows: float8_e4m3fn with one scale per row and 128 columns, the format that DeepEP and DeepGEMM exchange.

``scale = max(amax, 1e-4) / 448`` and ``q = e4m3(x * (448 / max(amax, 1e-4)))``, in float32; with a power of two,
``scale = 2^ceil(log2(scale))`` and ``q = e4m3(x / scale)``. The scaling per 1x128 tile is that of the DeepSeek-V3
report (arXiv 2412.19437, section 3.3.2); UE8M0 is the scale format of the OCP Microscaling specification (exponent,
bias 127).

``amax`` is the largest magnitude of the finite numbers of the 128 columns, 0 if there are none. A NaN or an infinity
becomes NaN at its place, since e4m3fn has no infinity: always the byte 0x7F, whatever its sign and payload. The columns
beside it are cast as if it were 0. Scales are finite: powers of two lie between 2^-22 and 2^120. With 2^120 a number
from 248 * 2^120 (3.3e38) on rounds to 2^128, which float32 cannot hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenferry.errors import ArgumentError
from tokenferry.types import Quantized, Scale

__all__ = ["GROUP", "cast", "dequantize"]

GROUP = 128
"""Columns that share a scale; the last group of a row may have fewer."""

_MAX = 448.0
_MIN_AMAX = 1e-4
_BIAS = 127


def cast(x: Tensor, scale: Scale) -> Quantized:
    """Cast rows to FP8. Local, on x's device, not differentiable.

    Args:
        x: ``[..., H]`` floating point; numbers beyond the range of float32 count as infinities.
        scale: Format of the scales.

    Returns:
        Quantized: ``data`` ``[..., H]`` float8_e4m3fn; ``scale`` ``[..., ceil(H / 128)]`` float32, or for UE8M0
        ``[..., ceil(H / 512)]`` int32.

    Raises:
        ArgumentError: ``scale`` is no `Scale`.

    Example:
        >>> import torch
        >>> from tokenferry import Scale
        >>> from tokenferry.formats import fp8
        >>> rows = fp8.cast(torch.full((1, 128), 7.0), Scale.POWER_OF_TWO)
        >>> rows.scale.item(), rows.data.float()[0, 0].item() * rows.scale.item()
        (0.015625, 7.0)
    """
    if not isinstance(scale, Scale):
        raise ArgumentError(f"fp8.cast: scale: expected a tokenferry.Scale, got {scale!r}")
    with torch.no_grad():
        groups = _grouped(x.float())
        finite = groups.abs().nan_to_num_(nan=0.0, posinf=0.0)
        amax = finite.amax(dim=-1, keepdim=True).clamp_(min=_MIN_AMAX)
        # Divide by a tensor: on GPUs, torch divides by a number by multiplying with its rounded reciprocal.
        exact = amax / torch.full_like(amax, _MAX)
        if scale is Scale.FLOAT32:
            factor = exact
            groups = groups * (_MAX / amax)
        else:
            factor = _round_up_to_power_of_two(exact)
            groups = groups / factor
        groups.nan_to_num_(nan=torch.nan, posinf=torch.nan, neginf=torch.nan)  # the cast keeps the sign of a NaN
        # In older torch the cast gives NaN above 464, where the hardware saturates.
        data = groups.clamp_(-_MAX, _MAX).to(torch.float8_e4m3fn)
        data = data.flatten(-2)[..., : x.shape[-1]].contiguous()
        factor = factor.squeeze(-1)
        return Quantized(data, _exponents(factor) if scale is Scale.UE8M0 else factor)


def dequantize(rows: Quantized) -> Tensor:
    """Return ``[..., H]`` float32: each FP8 row times its scales, which may have any of the three formats. Local.

    Args:
        rows: FP8 rows as `cast` returns them.
    """
    scale = rows.scale
    if scale.dtype == torch.int32:
        exponents = scale.reshape(-1).view(torch.uint8).view(*scale.shape[:-1], 4 * scale.shape[-1])
        scale = _power_of_two(exponents)
    hidden = rows.data.shape[-1]
    factor = scale.repeat_interleave(GROUP, dim=-1)[..., :hidden]
    return rows.data.float() * factor


def _grouped(x: Tensor) -> Tensor:
    """View ``[..., H]`` as ``[..., groups, 128]``, the last group padded with zeros."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % GROUP))
    return x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)


def _round_up_to_power_of_two(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2^exponent, mantissa in [0.5, 1): exact, unlike log2
    return _power_of_two(exponent - (mantissa == 0.5).to(exponent.dtype) + _BIAS)


def _power_of_two(biased: Tensor) -> Tensor:
    """Return 2^(biased - 127) as float32, made from its bits: exact, unlike exp2."""
    return (biased.to(torch.int32) << 23).view(torch.float32)


def _exponents(scale: Tensor) -> Tensor:
    """Pack powers of two into exponent bytes, four to an int32, lowest byte first; unused bytes are 0."""
    _, exponent = torch.frexp(scale)
    if not scale.shape[-1]:
        return torch.empty(scale.shape, dtype=torch.int32, device=scale.device)
    exponents = torch.nn.functional.pad((exponent - 1 + _BIAS).to(torch.uint8), (0, -scale.shape[-1] % 4))
    return exponents.contiguous().view(torch.int32)
