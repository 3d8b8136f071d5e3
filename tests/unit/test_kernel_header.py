"""Declarations that host and kernels share, and the C++ that is made of them."""

import re

from tokenferry.kernels import codes, control_block, decode_words
from tokenferry.kernels.describe import GENERATED
from tokenferry.kernels.header import Field, Header


def test_a_header():
    header = Header("generated/toy.cuh", "toy.py")
    rows = header.constant("kRows", 3, "rows")
    layout = header.struct("Toy", [Field("words", "u64", (rows, 2), "[row][half]"), Field("last", "u32", (), "end")])
    assert rows == 3
    assert (layout.offsets, layout.num_bytes) == ({"words": 0, "last": 48}, 52)
    assert header.text.splitlines() == [
        "// Generated from toy.py: change it there.",
        "#pragma once",
        "",
        "constexpr u32 kRows = 3;  // rows",
        "",
        "struct Toy {",
        "    u64 words[3][2];  // [row][half]",
        "    u32 last;  // end",
        "};",
        "static_assert(TOKENFERRY_OFFSET(Toy, words) == 0);",
        "static_assert(TOKENFERRY_OFFSET(Toy, last) == 48);",
        "static_assert(sizeof(Toy) == 52);",
        "",
    ]


def test_every_header_is_offered_to_kernels():
    assert list(GENERATED) == [one.HEADER.name for one in (control_block, codes, decode_words)]


def test_no_name_is_declared_twice():
    declared = re.findall(r"^(?:constexpr u32|struct) (\w+)", "\n".join(GENERATED.values()), re.MULTILINE)
    assert declared
    assert len(set(declared)) == len(declared)


def test_the_control_block_fills_the_window_up_to_the_heap():
    text = GENERATED[control_block.HEADER.name]
    assert f"static_assert(sizeof(ControlBlock) == {control_block.CONTROL_BLOCK_BYTES});" in text
    assert control_block.CONTROL_BLOCK_OFFSETS["handshake"] == 0
    offsets = control_block.CONTROL_BLOCK_OFFSETS.items()
    aligned = [at % 8 == 0 for name, at in offsets if f"u64 {name}[" in text or f"u64 {name};" in text]
    assert len(aligned) == 9
    assert all(aligned)


def test_words_of_a_handshake_do_not_overlap():
    """`dispatch` and the two combines each have words of their own behind the first offset."""
    c = control_block
    dispatch = (
        c.RECV_ROWS_WORD, c.RECV_SCALE_WORD, c.RECV_WEIGHTS_WORD, c.RECV_IDS_WORD, c.RECV_SRC_TOKEN_WORD,
        c.RECV_ROW_IDX_WORD,
    )  # fmt: skip
    combine = (c.COMBINE_ROWS_WORD, c.COMBINE_WEIGHTS_WORD, c.START_WORD, c.SHIFT_WORD, c.ROWS_AT_WORD, c.CAPACITY_WORD)
    for words in (dispatch, combine):
        assert len(set(words)) == len(words)
        assert all(c.ROWS_WORD < word < c.BLOCKS_WORD for word in words)
    assert c.DISPATCH_WORD < c.SIGNATURE_WORDS == c.ROWS_WORD < c.BLOCKS_WORD < c.HANDSHAKE_WORDS
