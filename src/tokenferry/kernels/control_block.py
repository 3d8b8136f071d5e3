"""The control block and the handshake, as the host sees them: sizes, codes, names of words."""

from __future__ import annotations

import enum

MAX_RANKS = 8
MAX_EXPERTS = 4096
MAX_TOP_K = 64
MAX_LANDED = 4096
"""Units of rows from one rank of whose landing `push` tells."""
CONTROL_BLOCK_BYTES = 1 << 20
"""A window begins with its control block; the heap follows."""
RECORD_WORDS = 8
HANDSHAKE_WORDS = 32
SIGNATURE_WORDS = 15
DISPATCH_WORD = 14
"""Of the signature of a decode combine: the epoch of its dispatch, which the kernel fills in."""
ROWS_WORD = 15
FIRST_OFFSET = 16
"""First word of a handshake that is not compared: offsets in the window, in units of `OFFSET_BYTES`."""
START_WORD, ROOM_WORD = FIRST_OFFSET + 2, FIRST_OFFSET + 5
"""Of a handshake of `push`: rows before those for its reader, and rows that there is room for, of its reader."""
OFFSET_BYTES = 16
RANK_SHIFT = 28
"""A place on another rank is ``rank << RANK_SHIFT | place`` in int32."""

_CONTROL_BLOCK = (
    ("handshake", 8, 2 * MAX_RANKS * HANDSHAKE_WORDS),
    ("counts", 8, 2 * MAX_RANKS * MAX_EXPERTS),
    ("gave_up", 8, MAX_RANKS),
    ("signatures", 8, 4 * MAX_RANKS * (SIGNATURE_WORDS + 1)),
    ("acks", 8, 2 * MAX_RANKS),
    ("verdict", 8, 2 * MAX_RANKS),
    ("received", 4, 4),
    ("sends", 4, 2),
    ("opened", 4, 2),
    ("masked", 4, 1),
    ("stopped", 4, 1),
)
"""Fields as far as the host looks at them: name, bytes of an item, items; their twin is device/control_block.cuh."""
CONTROL_BLOCK_OFFSETS = {
    name: sum(size * many for _, size, many in _CONTROL_BLOCK[:i]) for i, (name, _, _) in enumerate(_CONTROL_BLOCK)
}
"""Offset of each of these fields."""

COMMON = (
    ("windows", f"ptr[{MAX_RANKS}]"),
    ("record", "ptr"),
    ("wait_ns", "ptr"),
    ("timeout_ns", "u64"),
    ("rank", "u32"),
    ("num_ranks", "u32"),
    ("alive", "u32"),
    ("call_number", "u32"),
    ("handshake", f"u32[{HANDSHAKE_WORDS}]"),
)
"""What every params struct begins with: windows of all ranks, the host's record, where to add
nanoseconds waited for each rank (or 0), the deadline, this rank, R, a bit for each rank that takes part, the number
of the call, this rank's handshake."""


class Fault(enum.IntEnum):
    """Codes in a record; device/control_block.cuh has their twins."""

    late_handshake = 1
    late_rows = 2
    mismatch = 3
    peer_gave_up = 4
    bad_routing = 5
    overflow = 6


TRACE_WORDS = 32
"""What a block of a decode kernel writes down, in nanoseconds of its GPU's clock; words of device/decode.cuh:"""
TRACE = {"start": 0, "ready": 1, "sent": 2, "counts": 3, "end": 4}
"""Begun; peers have room; warp 0 has sent its rows; everybody's counts are here (dispatch); warp 0 is done."""
TRACE_SIGNATURE = 8
"""First of R words: the message of each rank was seen (last block only)."""
TRACE_ROWS = 16
"""First of R words: the last row of each rank was here."""
