"""The FP8 format against the oracle's loops, and back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.not_finite import any_bits, spoil
from tokenferry import ArgumentError, Scale
from tokenferry.formats import fp8
from tokenferry.testing.cases import payload
from tokenferry.testing.compare import close, same_bits
from tokenferry.testing.oracle import fp8_cast, ue8m0

FLOAT32_MAX = torch.finfo(torch.float32).max
NOT_FINITE = [math.inf, -math.inf, math.nan]


def rows(hidden: int) -> torch.Tensor:
    """Ordinary rows, zeros, tiny, huge, and maxima next to powers of two times 448."""
    x = payload(torch.arange(12), hidden, torch.float32)
    x[1] = 0.0
    x[2] = 1e-30
    x[3] *= 1e30
    for i, amax in enumerate((448.0, 896.0, 448.00003, 447.99997, 224.0, 1e-4, 3e38, FLOAT32_MAX)):
        x[4 + i] = x[4 + i].clamp(-1e-5, 1e-5)
        x[4 + i, 0] = -amax
    return x


@pytest.mark.parametrize("hidden", [16, 128, 144, 640, 1024])
@pytest.mark.parametrize("kind", Scale)
def test_cast_is_the_oracles(kind, hidden):
    check_cast(rows(hidden), kind)


def check_cast(x: torch.Tensor, kind: Scale) -> None:
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


@pytest.mark.parametrize("scale", ["ue8m0", "nonsense", None, True, "UE8M0"])
def test_a_format_of_scales_that_is_none(scale):
    """It would be taken for powers of two, without a word."""
    with pytest.raises(ArgumentError, match=rf"fp8\.cast: scale: expected a tokenferry\.Scale, got {scale!r}"):
        fp8.cast(torch.ones(2, 128), scale)


def test_leading_dimensions_stay():
    got = fp8.cast(torch.ones(2, 3, 256), Scale.UE8M0)
    assert got.data.shape == (2, 3, 256)
    assert got.scale.shape == (2, 3, 1)
    assert fp8.dequantize(got).shape == (2, 3, 256)


# ---------------------------------------------------------------------- infinities and NaNs


@pytest.mark.parametrize("kind", Scale)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_what_is_not_finite_changes_nothing_beside_it(kind, value):
    """Both examples lost all their numbers: an infinity made the scale of 1, a NaN that of zeros, or NaN."""
    for number in (1.0, 1000.0):
        x = torch.full((1, 128), number)
        want = fp8.cast(x, kind)
        x[0, 77] = value
        got = fp8.cast(x, kind)
        same_bits("scale", got.scale, want.scale)
        want.data.view(torch.uint8)[0, 77] = 0x7F
        same_bits("data", got.data, want.data)
        back = fp8.dequantize(got)
        assert back.isnan().nonzero().tolist() == [[0, 77]]
        close("the others", back[back.isfinite()], torch.full((127,), number), rtol=2.0**-4, atol=0.0)


@pytest.mark.parametrize("hidden", [16, 128, 144, 640])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", Scale)
def test_what_is_not_finite_is_cast_as_by_the_oracle(kind, dtype, hidden):
    x = spoil(payload(torch.arange(16), hidden, dtype))
    check_cast(x, kind)
    back = fp8.dequantize(fp8.cast(x, kind))
    assert back.isnan().equal(~x.isfinite())
    same_bits("the others", back.nan_to_num(0.0), fp8.dequantize(fp8.cast(x.nan_to_num(0.0, 0.0, 0.0), kind)))


@settings(max_examples=30)
@given(kind=st.sampled_from(Scale), seed=st.integers(0, 2**32), hidden=st.sampled_from([16, 128, 272]))
def test_any_bits_are_cast_as_by_the_oracle(kind, seed, hidden):
    check_cast(any_bits(torch.empty(2, hidden, dtype=torch.float32), seed), kind)


@pytest.mark.parametrize("kind", Scale)
def test_a_group_without_finite_numbers_has_the_scale_of_zeros(kind):
    x = torch.tensor(NOT_FINITE).repeat(43)[None, :128]
    got = fp8.cast(x, kind)
    assert (got.data.view(torch.uint8) == 0x7F).all()
    same_bits("scale", got.scale, fp8.cast(torch.zeros(1, 128), kind).scale)


def test_every_nan_is_the_one_without_a_sign():
    """Processors keep the sign of a NaN, GPUs do not."""
    signs = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0x400000 - (1 << 23), -1], dtype=torch.int32)
    x = torch.cat([signs.view(torch.float32), torch.ones(123)])[None]
    assert fp8.cast(x, Scale.FLOAT32).data.view(torch.uint8)[0].tolist() == [0x7F] * 5 + [0x7E] * 123


def test_numbers_beyond_float32_are_infinities():
    x = torch.ones(1, 128, dtype=torch.float64)
    x[0, :2] = torch.tensor([1e300, -1e39])
    back = fp8.dequantize(fp8.cast(x, Scale.POWER_OF_TWO))[0]
    assert back[:2].isnan().all()
    assert back[2:].tolist() == [1.0] * 126


@pytest.mark.parametrize(("amax", "exponent"), [(0.0, -22), (1e-4, -22), (FLOAT32_MAX, 120)])
def test_exponents_end_far_from_those_of_ue8m0(amax, exponent):
    """Its bytes 0 and 255 (NaN) are never used."""
    x = torch.zeros(1, 128)
    x[0, 5] = amax
    assert fp8.cast(x, Scale.POWER_OF_TWO).scale.item() == 2.0**exponent
    assert fp8.cast(x, Scale.UE8M0).scale.item() == exponent + 127


def test_numbers_next_to_the_largest_round_beyond_float32():
    """Only with powers of two: 248 * 2^120 is half-way between 240 and 256, and 256 * 2^120 is 2^128."""
    x = torch.zeros(1, 128)
    x[0, :3] = torch.tensor([FLOAT32_MAX, -248 * 2.0**120, 247 * 2.0**120])
    assert fp8.dequantize(fp8.cast(x, Scale.UE8M0))[0, :3].tolist() == [math.inf, -math.inf, 240 * 2.0**120]
    close("x", fp8.dequantize(fp8.cast(x, Scale.FLOAT32)), x, rtol=2.0**-4, atol=0.0)


@pytest.mark.parametrize("scale", list(Scale))
def test_rows_without_columns(scale):
    rows = fp8.cast(torch.zeros(3, 0), scale)
    assert rows.data.shape == rows.scale.shape == (3, 0)
    assert rows.scale.dtype == (torch.int32 if scale is Scale.UE8M0 else torch.float32)
