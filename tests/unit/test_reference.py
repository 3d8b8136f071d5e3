"""The reference of FP8 and logfmt10 on whole tensors, against the oracle's loops."""

import pytest
import torch

from support.not_finite import spoil
from tokenferry import Scale
from tokenferry.testing.cases import payload
from tokenferry.testing.compare import same_bits
from tokenferry.testing.oracle import encoded_row, fp8_cast, ue8m0
from tokenferry.testing.reference import beyond_a_code, encode_and_decode, logfmt10, unpacked
from tokenferry.testing.reference import fp8_cast as cast


def rows() -> torch.Tensor:
    """Ordinary rows, zeros, one magnitude, one number among zeros, and maxima next to powers of two times 448."""
    x = payload(torch.arange(8), 384, torch.float32)
    x[0, :7], x[1, :128], x[2, :128], x[3, 128:256] = 0.0, 0.0, -3.0, -0.0
    x[4, 1:128] = 0.0
    for i, amax in enumerate((448.0, 896.0, 448.00003)):
        x[5 + i] = x[5 + i].clamp(-1e-5, 1e-5)
        x[5 + i, 0] = -amax
    return x


@pytest.mark.parametrize("kind", [Scale.FLOAT32, Scale.POWER_OF_TWO])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_cast_is_the_oracles(kind, dtype):
    x = torch.cat([rows(), spoil(rows())]).to(dtype)
    data, scale = cast(x, kind)
    for row, row_data, row_scale in zip(x, data, scale, strict=True):
        want, want_scale = fp8_cast(row, power_of_two=kind is not Scale.FLOAT32)
        assert row_data.view(torch.uint8).equal(want.view(torch.uint8))
        assert row_scale.equal(want_scale)


def test_packed_scales_are_unpacked():
    _, scale = cast(rows(), Scale.UE8M0)
    packed = torch.stack([ue8m0(row) for row in scale])
    assert unpacked(packed, 3).equal(scale)
    assert unpacked(scale, 3) is scale


@pytest.mark.parametrize("encoding", ["same", "fp8", "logfmt10"])
def test_rows_arrive_as_those_of_the_oracle(encoding):
    x = torch.cat([rows(), spoil(rows())]).bfloat16()
    arrived = encode_and_decode(x, encoding)
    same_bits(encoding, arrived.values, torch.stack([encoded_row(row, encoding) for row in x]))
    assert (encoding == "logfmt10") == bool(arrived.one_code.any())


def test_the_next_code_is_about_a_step_away():
    decoded = logfmt10(rows())
    assert bool((decoded.one_code <= decoded.values.abs() * (2 ** (32 / 510) - 1)).all())
    assert bool((decoded.one_code[0, 128:] > 0).all())
    assert not bool(decoded.one_code[2, :128].any()), "numbers of one size have one code"


def test_few_numbers_may_take_the_other_code():
    want = torch.ones(4, 100)
    size, one_code = want.clone(), torch.full_like(want, 0.1)
    few, many, far = want.clone(), want.clone(), want.clone()
    few[0, :4] += 0.1
    many[0, :5] += 0.1
    far[2, 3] += 0.2
    assert not beyond_a_code(few, want, size, one_code).any()
    assert beyond_a_code(many, want, size, one_code).nonzero().tolist() == [[0, i] for i in range(5)]
    assert beyond_a_code(far, want, size, one_code).nonzero().tolist() == [[2, 3]]
    far[2, 3] = torch.nan
    assert beyond_a_code(far, want, size, one_code).nonzero().tolist() == [[2, 3]]
    assert not beyond_a_code(far, far, far, one_code).any()
