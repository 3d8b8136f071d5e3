"""The logfmt10 format against the oracle's search among all codes, and its bytes."""

import math

import pytest
import torch

from support.not_finite import spoil
from tokenferry import ShapeError
from tokenferry.formats import logfmt
from tokenferry.testing.cases import payload
from tokenferry.testing.compare import close, same_bits
from tokenferry.testing.oracle import encoded_row, logfmt10


def numbers(rows: torch.Tensor) -> torch.Tensor:
    """``[rows, H]``: sign << 9 | code of each column, read from the bytes bit by bit, as the format is written down."""
    table = []
    for row in rows.tolist():
        for first in range(0, len(row), 20):
            words = [int.from_bytes(bytes(row[at : at + 4]), "little") for at in range(first, first + 20, 4)]
            chunk = sum(word << (32 * i) for i, word in enumerate(words))
            table += [chunk >> (10 * i) & 1023 for i in range(16)]
    return torch.tensor(table).view(len(rows), -1)


def rows(hidden: int = 384) -> torch.Tensor:
    """Ordinary rows, ranges of all widths, and the ends of float32."""
    x = payload(torch.arange(10), hidden, torch.float32)
    x[1] = torch.where(x[1] > 0, 3.0, -3.0)  # one magnitude
    x[2] *= torch.exp2(-(torch.arange(hidden) % 45).float())  # more than the range holds
    x[3, 1:] = 0.0  # one number in zeros
    x[4] = 1.0 + torch.arange(hidden) * 2.0**-20  # a narrow range
    x[5] *= 2.0**-137  # many are subnormal
    x[6] *= 2.0**117
    x[6, 5] = torch.finfo(torch.float32).max
    x[7] = torch.where(x[7] > 0, 0.0, -0.0)
    x[8, :128] = 2.0 ** torch.arange(-64, 64)
    return x


def test_codes_are_the_nearest_of_all():
    x = rows()
    got = logfmt.encode(x)
    assert (got.data.dtype, got.data.shape) == (torch.uint8, (10, 480))
    assert (got.scale.dtype, got.scale.shape) == (torch.float32, (10, 6))
    want = torch.stack([torch.cat([logfmt10(block)[0] for block in row.split(128)]) for row in x])
    assert torch.equal(numbers(got.data) & 511, want)
    assert torch.equal(numbers(got.data) >> 9, x.signbit().long())
    same_bits("decoded", logfmt.decode(got), torch.stack([encoded_row(row, "logfmt10") for row in x]))


def test_ranges():
    lo, step = logfmt.encode(rows()).scale.view(10, 3, 2).unbind(2)
    x = rows().view(10, 3, 128).double().abs()
    for row in (0, 4, 9):
        close("lo", lo[row], x[row].amin(1).log2(), rtol=1e-6, atol=1e-6)
        close("hi", lo[row] + 510 * step[row], x[row].amax(1).log2(), rtol=1e-5, atol=1e-5)
    close("one magnitude", lo[1], torch.full((3,), math.log2(3)), rtol=1e-6, atol=0.0)
    assert step[1].tolist() == [0.0] * 3
    assert (lo[7].tolist(), step[7].tolist()) == ([0.0] * 3, [0.0] * 3)
    assert (lo[3, 1:].tolist(), step[3].tolist()) == ([0.0] * 2, [0.0] * 3)
    close("32 powers of two", step[2] * 510, torch.full((3,), 32.0), rtol=1e-6, atol=0.0)


def test_what_is_below_the_range_becomes_zero_or_its_end():
    x = torch.zeros(1, 128)
    x[0, :6] = torch.tensor([2.0**32, 1.0, 0.75, -0.5, -0.4999, -(2.0**-100)])
    got = logfmt.encode(x)
    assert (numbers(got.data)[0, :7] & 511).tolist() == [511, 1, 1, 1, 0, 0, 0]
    back = logfmt.decode(got)[0]
    assert back[1:7].tolist() == [1.0, 1.0, -1.0, 0.0, 0.0, 0.0]
    assert float(back[0]) == pytest.approx(2.0**32, rel=2e-5)  # 510 times the rounding of step


def test_rounding_is_to_the_nearest_value_not_logarithm():
    """Between two codes the arithmetic mean parts them; the geometric one is lower."""
    x = torch.ones(1, 128)
    x[0, 0] = 2.0**30
    step = float(logfmt.encode(x).scale[0, 1])
    low, high = 2.0 ** (400 * step), 2.0 ** (401 * step)
    between = ((low + high) / 2 + math.sqrt(low * high)) / 2
    assert math.sqrt(low * high) < between < (low + high) / 2
    x[0, 1], x[0, 2] = between, (low + high) / 2 * 1.00001
    assert (numbers(logfmt.encode(x).data)[0, :4] & 511).tolist() == [511, 401, 402, 1]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_changes_nothing_beside_it(value):
    """All 128 columns became NaN."""
    x = payload(torch.arange(2), 384, torch.float32)
    x[0, 130:133] = torch.tensor([0.0, 0.0, -0.0])
    before = logfmt.encode(x)
    x[0, 130] = value
    got, back = logfmt.encode(x), logfmt.decode(logfmt.encode(x))
    assert back.isnan().nonzero().tolist() == [[0, 130]]
    assert torch.equal(back.nan_to_num(0.0), logfmt.decode(before)), "0 and -0 are equal"
    assert back[0, 131:133].signbit().tolist() == [False, False], "a negative zero would be NaN"
    step = before.scale.clone()
    step[0, 3] *= -1
    same_bits("the sign of the step of the group, and no other scale", got.scale, step)
    want = numbers(before.data)
    want[0, 130:133] = torch.tensor([512, 0, 0])
    assert torch.equal(numbers(got.data), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:])
def test_what_is_not_finite_is_decoded_as_by_the_oracle(dtype):
    x = spoil(payload(torch.arange(16), 384, dtype))
    back = logfmt.decode(logfmt.encode(x))
    same_bits("decoded", back, torch.stack([encoded_row(row, "logfmt10") for row in x]))
    assert back.isnan().equal(~x.isfinite())
    zeros = logfmt.decode(logfmt.encode(x.nan_to_num(0.0, 0.0, 0.0)))
    assert torch.equal(back.nan_to_num(0.0), zeros)


def test_a_group_without_finite_numbers_has_the_range_of_zeros():
    x = torch.tensor([math.nan, math.inf, -math.inf, -math.nan]).repeat(32)[None]
    got = logfmt.encode(x)
    same_bits("range", got.scale, torch.tensor([[0.0, -0.0]]))
    assert numbers(got.data).unique().tolist() == [512]
    assert bool(logfmt.decode(got).isnan().all())
    x[0, 0] = 3.0  # one magnitude: the step is 0, and marked
    back = logfmt.decode(logfmt.encode(x))
    assert float(back[0, 0]) == pytest.approx(3.0)
    assert bool(back[0, 1:].isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_are_cast_from_their_float32_values(dtype):
    x = payload(torch.arange(5), 256, dtype)
    got, want = logfmt.encode(x), logfmt.encode(x.float())
    same_bits("data", got.data, want.data)
    same_bits("scale", got.scale, want.scale)


def test_half_a_step_at_most():
    x = payload(torch.arange(64), 1024, torch.float32)
    # 20 powers of two in 510 steps; the mean of two neighbours is half a step from either.
    close("x", logfmt.decode(logfmt.encode(x)), x, rtol=(2.0 ** (20 / 510) - 1) / 2, atol=0.0)


@pytest.mark.parametrize("shape", [(128,), (3, 5, 256), (0, 128), (2, 0, 128), (700, 384)])
def test_leading_dimensions_stay_and_blocks_do_not_show(shape):
    x = payload(torch.arange(math.prod(shape) // 128), 128, torch.float32).view(shape)
    got = logfmt.encode(x)
    assert got.data.shape == (*shape[:-1], shape[-1] // 128 * 160)
    assert got.scale.shape == (*shape[:-1], shape[-1] // 128 * 2)
    one_by_one = [logfmt.decode(logfmt.encode(group)) for group in x.reshape(-1, 128)]
    want = torch.stack(one_by_one).view(shape) if one_by_one else x
    same_bits("decoded", logfmt.decode(got), want)


def test_strides_do_not_matter():
    x = payload(torch.arange(128), 256, torch.float32)
    same_bits("data", logfmt.encode(x.t()[:, :128]).data, logfmt.encode(x.t()[:, :128].contiguous()).data)


def test_half_groups_are_refused():
    with pytest.raises(ShapeError, match=r"x: expected H to be a multiple of 128, got \[2, 192\]"):
        logfmt.encode(torch.ones(2, 192))
