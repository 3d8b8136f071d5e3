"""One list of fields, two structs. That a compiler agrees is shown in tests/compile."""

import copy
import ctypes

import pytest

from tokenferry.errors import ConfigError
from tokenferry.jit.params import Params

FIELDS = [("x", "ptr"), ("n", "i32"), ("to", "ptr:const u64[2]"), ("few", "u32[3]"), ("f", "f32"), ("big", "i64")]


def test_cpp():
    assert Params("ToyParams", FIELDS).cpp.splitlines()[:10] == [
        "struct ToyParams {",
        "  unsigned char* x;",
        "  i32 n;",
        "  const u64* to[2];",
        "  u32 few[3];",
        "  f32 f;",
        "  i64 big;",
        "};",
        'static_assert(sizeof(ToyParams) == 56, "Python and C++ lay out ToyParams differently");',
        'static_assert(TOKENFERRY_OFFSET(ToyParams, x) == 0, "Python and C++ lay out ToyParams differently");',
    ]


def test_the_struct_is_filled_by_name_and_starts_at_zero():
    params = Params("ToyParams", FIELDS).struct()
    assert bytes(params) == bytes(56)
    params.x, params.n, params.to[1], params.f = 2**63, -1, 5, 0.5
    assert (params.x, params.n, list(params.to), params.f) == (2**63, -1, [0, 5], 0.5)
    assert bytes(params)[8:12] == b"\xff" * 4


def test_a_misspelt_field_is_an_error():
    params = Params("ToyParams", FIELDS).struct()
    with pytest.raises(AttributeError, match="num"):
        params.num = 3


def test_the_arguments_point_to_the_struct():
    params = Params("ToyParams", FIELDS).struct(n=7)
    assert ctypes.c_uint64.from_address(params.arguments_address).value == ctypes.addressof(params)


def test_a_copy_would_share_the_arguments_and_is_refused():
    with pytest.raises(AttributeError):
        copy.copy(Params("ToyParams", FIELDS).struct())


@pytest.mark.parametrize("kind", ["int", "u8", "u32:int", "ptr[0]", "ptr[]", "ptr:", "u32[4][4]", "ptr:int;", ""])
def test_unknown_types(kind):
    with pytest.raises(ConfigError, match=r"ToyParams\.x: type .* is unknown; expected ptr, u64"):
        Params("ToyParams", [("x", kind)])


@pytest.mark.parametrize("names", [["x", "x"], ["_x"], ["a b"], ["arguments_address"]])
def test_bad_names(names):
    with pytest.raises(ConfigError, match="ToyParams: field name"):
        Params("ToyParams", [(name, "u32") for name in names])
