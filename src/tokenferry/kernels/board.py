"""The host's half of device/board.cuh and device/meet.cuh: sizes, codes, and what the words of a card are called."""

from __future__ import annotations

import enum

MAX_RANKS = 8
MAX_EXPERTS = 4096
MAX_TOP_K = 64
MAX_LANDED = 4096
"""Units of rows from one rank of whose landing `push` tells."""
BOARD_BYTES = 1 << 20
"""A window begins with its board; the heap follows."""
RECORD_WORDS = 8
CARD_WORDS = 32
SIGNATURE_WORDS = 15
DISPATCH_WORD = 14
"""Of the signature of a decode combine: the epoch of its dispatch, which the kernel fills in."""
ROWS_WORD = 15
FIRST_OFFSET = 16
"""First word of a card that is not compared: offsets in the window, in units of `OFFSET_BYTES`."""
START_WORD, ROOM_WORD = FIRST_OFFSET + 2, FIRST_OFFSET + 5
"""Of a card of `push`: rows before those for its reader, and rows that there is room for, of its reader."""
OFFSET_BYTES = 16
RANK_SHIFT = 28
"""A place on another rank is ``rank << RANK_SHIFT | place`` in int32."""

_BOARD = (
    ("card", 8, 2 * MAX_RANKS * CARD_WORDS),
    ("counts", 8, 2 * MAX_RANKS * MAX_EXPERTS),
    ("gave_up", 8, MAX_RANKS),
    ("hello", 8, 4 * MAX_RANKS * (SIGNATURE_WORDS + 1)),
    ("acks", 8, 2 * MAX_RANKS),
    ("verdict", 8, 2 * MAX_RANKS),
    ("received", 4, 4),
    ("sends", 4, 2),
    ("opened", 4, 2),
    ("masked", 4, 1),
    ("stopped", 4, 1),
)
"""Fields of a board as far as the host looks at them: name, bytes of an item, items; device/board.cuh is their twin."""
BOARD_AT = {name: sum(size * many for _, size, many in _BOARD[:i]) for i, (name, _, _) in enumerate(_BOARD)}
"""Offset of each of these fields."""

COMMON = (
    ("windows", f"ptr[{MAX_RANKS}]"),
    ("record", "ptr"),
    ("wait_ns", "ptr"),
    ("timeout_ns", "u64"),
    ("rank", "u32"),
    ("num_ranks", "u32"),
    ("alive", "u32"),
    ("call", "u32"),
    ("card", f"u32[{CARD_WORDS}]"),
)
"""What every params struct begins with: windows of all ranks, the host's record, where to add
nanoseconds waited for each rank (or 0), the deadline, this rank, R, a bit for each rank that takes part, the number
of the call, this rank's card."""


class Fault(enum.IntEnum):
    """Codes in a record; device/board.cuh has their twins."""

    late_card = 1
    late_rows = 2
    mismatch = 3
    peer_gave_up = 4
    bad_routing = 5
    overflow = 6


TRACE_WORDS = 32
"""What a block of a decode kernel writes down, in nanoseconds of its GPU's clock; words of device/decode.cuh:"""
TRACE = {"start": 0, "ready": 1, "sent": 2, "told": 3, "end": 4}
"""Begun; peers have room; warp 0 has sent its rows; everybody's counts are here (dispatch); warp 0 is done."""
TRACE_HELLO = 8
"""First of R words: the message of each rank was seen (last block only)."""
TRACE_ROWS = 16
"""First of R words: the last row of each rank was here."""
