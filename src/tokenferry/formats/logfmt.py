"""Logfmt10 rows: 10 bits per number, logarithmic, with a range for each row and 128 columns.

The format LogFMT of "Insights into DeepSeek-V3" (arXiv 2505.09343, section on communication compression) with 10 bits:
in each group, codes are spaced evenly between the logarithms of the smallest and the largest magnitude, zero has a code
of its own, the smallest is kept within 2^32 of the largest, and rounding is to the nearest *value*, not to the nearest
logarithm, which would be biased. Details that the paper leaves open are defined below.

For one group, with a = abs(x) over its finite numbers other than zero:

    hi   = log2(max a)                           at most 127.9999, so that no code stands for an infinity
    lo   = max(log2(min a), hi - 32)             at most hi
    step = (hi - lo) / 510                       lo, hi and step are float32
    code 0 stands for 0, code c in 1..511 for 2^(lo + step * (c - 1))

Each magnitude gets the code of the nearest value, the higher code in a tie; magnitudes below 2^lo become 0 or 2^lo. If
step is 0, because all magnitudes are equal, the code is 1. A group without such numbers has lo = step = 0. The sign
bit, also of a zero, is kept. Since step is rounded, the largest magnitude is reproduced to within 2e-5 of itself.

A NaN or an infinity becomes NaN at its place, and the columns beside it keep the values that they would have beside a
zero. There is no free code: in a group that holds one, which the sign bit of its step marks (-0.0, too), the negative
zero stands for NaN, and zeros lose their sign.

Bytes: the number of a column is ``sign << 9 | code``. A row consists of these numbers, lowest bit first, without gaps,
so that 16 columns take 20 bytes (five little-endian uint32, number i from bit 10 * i) and a group takes 160. lo and
step of each group are stored separately, as the scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenferry.errors import ShapeError
from tokenferry.types import Quantized

__all__ = ["GROUP", "GROUP_BYTES", "decode", "encode"]

GROUP = 128
"""Columns that share a range; H must be a multiple of it."""

GROUP_BYTES = 160
"""Bytes of the codes of a group."""

_TOP = 510
"""The highest code minus 1: the number of steps between the ends of the range."""
_RANGE = 32.0
_MAX_LOG = 127.9999
_SIGN = 1 << 9
_CODES = _SIGN - 1
_NEGATIVE_ZERO = _SIGN
"""NaN, in groups whose step is marked."""
_BITS = 10
_QUAD = 4
"""The least count of numbers that fill whole bytes."""
_QUAD_BYTES = 5
_BLOCK = 1 << 16
"""Numbers processed at once on a CPU: the float64 intermediate results should stay in cache."""


def encode(x: Tensor) -> Quantized:
    """Cast rows to logfmt10. Local, on x's device, not differentiable.

    Logarithms are computed in float64, so that the result depends on the numbers only.

    Args:
        x: ``[..., H]`` bfloat16, float16 or float32, H a multiple of 128.

    Returns:
        Quantized: ``data`` ``[..., H / 128 * 160]`` uint8; ``scale`` ``[..., H / 128 * 2]`` float32: lo and step of
        each group in turn, step negative or -0.0 if the group holds a NaN or an infinity.

    Raises:
        ShapeError: H is not a multiple of 128.

    Example:
        >>> import torch
        >>> from tokenferry.formats import logfmt
        >>> rows = logfmt.encode(torch.tensor([[4.0, -1.0, 0.0, 2.0] * 32]))
        >>> rows.data.shape, rows.scale.tolist()
        (torch.Size([1, 160]), [[0.0, 0.003921568859368563]])
        >>> logfmt.decode(rows)[0, :4].bfloat16().tolist()
        [4.0, -1.0, 0.0, 2.0]
    """
    if x.shape[-1] % GROUP:
        raise ShapeError(f"logfmt.encode: x: expected H to be a multiple of {GROUP}, got {list(x.shape)}; pad the rows")
    with torch.no_grad():
        groups = x.contiguous().view(-1, GROUP)
        data = torch.empty(len(groups), GROUP_BYTES, dtype=torch.uint8, device=x.device)
        ranges = torch.empty(len(groups), 2, dtype=torch.float32, device=x.device)
        for first in range(0, len(groups), _block(x)):
            part = slice(first, first + _block(x))
            _encode(groups[part], data[part], ranges[part])
        num_groups = x.shape[-1] // GROUP
        lead = x.shape[:-1]
        return Quantized(data.view(*lead, num_groups * GROUP_BYTES), ranges.view(*lead, num_groups * 2))


def decode(rows: Quantized) -> Tensor:
    """Return ``[..., H]`` float32: the values of the codes. Local.

    Args:
        rows: Logfmt10 rows as `encode` returns them.
    """
    lead, num_groups = rows.data.shape[:-1], rows.data.shape[-1] // GROUP_BYTES
    data, ranges = rows.data.reshape(-1, GROUP_BYTES), rows.scale.reshape(-1, 2)
    out = torch.empty(len(data), GROUP, dtype=torch.float32, device=data.device)
    for first in range(0, len(data), _block(data)):
        part = slice(first, first + _block(data))
        _decode(data[part], ranges[part], out[part])
    return out.view(*lead, num_groups * GROUP)


def _encode(x: Tensor, data: Tensor, ranges: Tensor) -> None:
    """Encode groups ``[n, 128]`` to their bytes ``[n, 160]`` and ranges ``[n, 2]``."""
    size = x.double().abs()
    marked = ~size.amax(1, keepdim=True).isfinite()
    size.nan_to_num_(nan=0.0, posinf=0.0)
    largest = size.amax(1, keepdim=True)
    smallest = size.masked_fill(size == 0, torch.inf).amin(1, keepdim=True)
    # The ends of the range as float32, which is what the receiver gets.
    hi = largest.log2().clamp(max=_MAX_LOG).float()
    lo = torch.minimum(torch.maximum(smallest.log2(), hi.double() - _RANGE).float(), hi)
    step = (hi - lo) / torch.full_like(hi, _TOP)
    for one in (lo, step):
        one.masked_fill_(largest == 0, 0.0)
    ranges.copy_(torch.cat([lo, torch.where(marked, -step, step)], dim=1))

    below = ((size.log2() - lo) / step).floor_().nan_to_num_(nan=0.0).clamp_(0, _TOP - 1)
    lower, upper = _value(lo, step, below), _value(lo, step, below + 1)
    # If rounding made `below` one too high, `lower` is still the nearest value; if one too low, `upper` is.
    code = below + 1 + (size - lower >= upper - size)
    code.masked_fill_(step == 0, 1.0).masked_fill_(2 * size < lower, 0.0)
    negative = torch.where(marked & (code == 0), ~x.isfinite(), x.signbit())
    _pack(code.long() + torch.where(negative, _SIGN, 0), data)


def _decode(data: Tensor, ranges: Tensor, out: Tensor) -> None:
    """Decode bytes ``[n, 160]`` and ranges ``[n, 2]`` to groups ``[n, 128]``."""
    numbers = _unpack(data)
    code = numbers & _CODES
    lo, step = ranges.unsqueeze(2).unbind(1)
    value = _value(lo, step.abs(), code.double() - 1).masked_fill_(code == 0, 0.0)
    value = torch.where(numbers >= _SIGN, -value, value)
    out.copy_(value.masked_fill_((numbers == _NEGATIVE_ZERO) & step.signbit(), torch.nan))


def _value(lo: Tensor, step: Tensor, steps: Tensor) -> Tensor:
    """Return 2^(lo + step * steps), float64."""
    return (lo.double() + step.double() * steps).exp2_()


def _pack(numbers: Tensor, data: Tensor) -> None:
    quads = numbers.view(-1, _QUAD)
    joined = quads[:, 0].clone()
    for i in range(1, _QUAD):
        joined |= quads[:, i] << (_BITS * i)
    data.copy_(joined.view(-1, 1).view(torch.uint8)[:, :_QUAD_BYTES].reshape(data.shape))


def _unpack(data: Tensor) -> Tensor:
    quads = torch.nn.functional.pad(data.reshape(-1, _QUAD_BYTES), (0, 8 - _QUAD_BYTES)).view(torch.int64)
    numbers = [quads >> (_BITS * i) & (_SIGN | _CODES) for i in range(_QUAD)]
    return torch.cat(numbers, dim=1).view(len(data), GROUP)


def _block(x: Tensor) -> int:
    """Return the number of groups to process at once."""
    return _BLOCK // GROUP if x.device.type == "cpu" else max(x.numel(), 1)
