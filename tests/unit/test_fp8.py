"""The FP8 format against the oracle's loops, and back."""

import pytest
import torch

from tokenferry import Scale
from tokenferry.formats import fp8
from tokenferry.testing.cases import payload
from tokenferry.testing.compare import close, same_bits
from tokenferry.testing.oracle import fp8_cast, ue8m0


def rows(hidden: int) -> torch.Tensor:
    """Ordinary rows, zeros, tiny, huge, and maxima next to powers of two times 448."""
    x = payload(torch.arange(12), hidden, torch.float32)
    x[1] = 0.0
    x[2] = 1e-30
    x[3] *= 1e30
    for i, amax in enumerate((448.0, 896.0, 448.00003, 447.99997, 224.0, 1e-4, 3e38)):
        x[4 + i] = x[4 + i].clamp(-1e-5, 1e-5)
        x[4 + i, 0] = -amax
    return x


@pytest.mark.parametrize("hidden", [16, 128, 144, 640, 1024])
@pytest.mark.parametrize("kind", Scale)
def test_cast_is_the_oracles(kind, hidden):
    x = rows(hidden)
    got = fp8.cast(x, kind)
    casts = [fp8_cast(row, power_of_two=kind is not Scale.FLOAT32) for row in x]
    same_bits("data", got.data, torch.stack([cast.view(torch.uint8) for cast, _ in casts]).view(torch.float8_e4m3fn))
    scales = [ue8m0(scale) if kind is Scale.UE8M0 else scale for _, scale in casts]
    same_bits("scale", got.scale, torch.stack(scales))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_are_cast_from_their_float32_values(dtype):
    x = payload(torch.arange(5), 128, dtype)
    got, want = fp8.cast(x, Scale.FLOAT32), fp8.cast(x.float(), Scale.FLOAT32)
    same_bits("data", got.data, want.data)
    same_bits("scale", got.scale, want.scale)


@pytest.mark.parametrize("kind", Scale)
def test_dequantize_comes_back_within_the_formats_precision(kind):
    x = payload(torch.arange(8), 656, torch.float32)
    back = fp8.dequantize(fp8.cast(x, kind))
    amax = x.abs().amax()
    # Three bits of mantissa: half of 2^-3 of the value, or of the smallest subnormal step at the largest scale.
    close("x", back, x, rtol=2.0**-4, atol=float(amax) / 448 * 2 * 2.0**-10)


def test_leading_dimensions_stay():
    got = fp8.cast(torch.ones(2, 3, 256), Scale.UE8M0)
    assert got.data.shape == (2, 3, 256)
    assert got.scale.shape == (2, 3, 1)
    assert fp8.dequantize(got).shape == (2, 3, 256)
