"""One list of fields, two structs. That a compiler agrees is shown in tests/compile."""

import copy
import ctypes
import struct

import pytest

from tokenferry.errors import ConfigError
from tokenferry.jit.params import Items, Packer, Params

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


# ---------------------------------------------------------------------- packers

PACKED = [("x", "ptr"), ("n", "i32"), ("f", "f32"), ("m", "u32"), ("big", "i64"), ("few", "u32[3]"), ("end", "u32")]
TOY = Params("ToyParams", PACKED).struct


def test_a_packer_writes_its_fields_and_no_other():
    params = TOY(*(1 for _ in PACKED[:5]), (1, 1, 1), 1)
    Packer(TOY, "n", "f", "m").bind(params)(-2, 0.5, 2**32 - 1)
    assert (params.n, params.f, params.m) == (-2, 0.5, 2**32 - 1)
    assert (params.x, params.big, list(params.few), params.end) == (1, 1, [1, 1, 1], 1)


def test_a_packer_of_items_writes_no_other_item():
    params = TOY(few=(7, 7, 7), big=7, end=7)
    Packer(TOY, Items("few", 1, 2)).bind(params)(8, 9)
    assert (params.big, list(params.few), params.end) == (7, [7, 8, 9], 7)


def test_a_packer_of_items_and_fields_sets_items_that_are_left_out_to_zero():
    params = TOY(f=7, big=7, few=(7, 7, 7), end=7)
    Packer(TOY, "big", Items("few", 0, 1, raw=True), "end").bind(params)(8, b"\x09\0\0\0", 10)
    assert (params.f, params.big, list(params.few), params.end) == (7, 8, [9, 0, 0], 10)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["x", "number"], r"ToyParams\.number is none of x, n, f, m, big, few, end"),
        (["n", "x"], r"ToyParams\.x is at byte 0, expected 12, right behind n"),
        (["x", "f"], r"ToyParams\.f is at byte 12, expected 8, right behind x"),
        (["m", "big"], r"ToyParams\.big is at byte 24, expected 20, right behind m"),
        (["n", "n"], r"ToyParams\.n is at byte 8, expected 12, right behind n"),
        (["big", "few"], r"ToyParams\.few is an array; use Items"),
        ([], "ToyParams: expected at least one field"),
    ],
    ids=["name", "order", "gap", "padding", "twice", "array", "none"],
)
def test_a_packer_that_does_not_fit_its_struct(names, problem):
    """It is found when the packer is made; at a launch it would be a value in the wrong place."""
    with pytest.raises(ConfigError, match=problem):
        Packer(TOY, *names)


def test_a_field_that_became_wider_is_packed_as_wide_as_it_is():
    wider = Params("ToyParams", [("n", "u64"), ("m", "u32")]).struct
    packer = Packer(wider, "n", "m")
    assert (packer.offset, packer.num_bytes) == (0, 12)
    params = wider()
    packer.bind(params)(2**40, 3)
    assert (params.n, params.m) == (2**40, 3)


@pytest.mark.parametrize(("name", "first", "count"), [("few", 2, 2), ("few", 0, 0), ("few", -1, 2), ("n", 0, 1)])
def test_items_that_an_array_does_not_have(name, first, count):
    with pytest.raises(ConfigError, match=rf"ToyParams\.{name} has \d items, expected items"):
        Packer(TOY, Items(name, first, count))


def test_a_packer_is_bound_to_its_own_struct_only():
    other = Params("OtherParams", PACKED).struct()
    with pytest.raises(ConfigError, match="expected ToyParams, got OtherParams"):
        Packer(TOY, "x").bind(other)


@pytest.mark.parametrize("values", [(1,), (1, 2, 3), ("x", 1), (2**64, 1)])
def test_values_that_do_not_fit(values):
    with pytest.raises(struct.error):
        Packer(TOY, "x", "n").bind(TOY())(*values)


def test_bound_fields_keep_the_struct_alive():
    params = TOY()
    view, _ = Packer(TOY, "x").bind(params).args
    assert view.obj is params
