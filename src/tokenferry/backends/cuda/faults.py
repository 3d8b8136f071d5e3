"""What the device tells the host: the record of the first fault, and the counts of a dispatch. Both in pinned memory.

Kernels never trap and never throw: they write down what they found and return. The host looks when it waits for counts,
at the start of every call, and in `ExpertGroup.synchronize`.
"""

from __future__ import annotations

import ctypes
import struct
import time
from collections import deque

import torch

from tokenferry.errors import CapacityError, MismatchError, PeerTimeout, RoutingError, TokenferryError
from tokenferry.formats.dtypes import dtype_name
from tokenferry.kernels.control_block import (
    DISPATCH_WORD,
    MAX_EXPERTS,
    MAX_RANKS,
    RECORD_WORDS,
    ROOM_WORD,
    ROWS_WORD,
    SIGNATURE_WORDS,
    START_WORD,
    Fault,
)
from tokenferry.kernels.dispatch_notify.spec import HOST_WORDS_BEFORE_EXPERTS
from tokenferry.transports.base import CallId, peer_timeout

_REMEMBERED_CALLS = 64
_STARTING_S = 1.0
"""Added to a deadline on the host: kernels keep their own, which starts when they do."""


KINDS = ("", "dispatch", "redispatch", "combine", "decode_dispatch", "decode_combine")
"""What word 0 of a signature says; all kernels of a call announce the same."""
_USERS_NAMES = ("num_experts", "max_tokens", "topk_idx", "top_k")
"""Arguments of the user: they keep their underscores when a field is put into words."""


class Signature:
    """What a call announces on its handshakes: its kind, then the fields that have to be the same on all ranks.

    Attributes:
        phase: The call's name.
        fields: By name; the first is ``("kind", n)``, n an index of `KINDS`.
        words: The same, packed as the words of a handshake.
    """

    __slots__ = ("fields", "phase", "words")

    def __init__(self, phase: str, **fields: int) -> None:
        self.phase = phase
        self.fields = (("kind", KINDS.index(phase)), *fields.items())
        values = [value & 0xFFFFFFFF for _, value in self.fields]
        self.words = struct.pack(f"<{SIGNATURE_WORDS}I", *values, *(0,) * (SIGNATURE_WORDS - len(values)))


SIGNATURE_BYTES = 4 * SIGNATURE_WORDS


def _field_name(name: str) -> str:
    """A field's name as a message says it: "bytes_of_topk_idx" is "bytes of topk_idx"."""
    said = name.replace("_", " ")
    for users in _USERS_NAMES:
        said = said.replace(users.replace("_", " "), users)
    return said


_kept: list[torch.Tensor] = []
"""Pinned memory of all groups, for ever: kernels that write it may still be queued when nobody knows their group."""


class Pinned:
    """Pinned memory that kernels write and the host reads: a record, then ticket and counts.

    Args:
        pin: Whether it has to be pinned; kernels that run on the CPU reach any memory.

    Attributes:
        record_address: For the field ``record`` of params.
        host_address: For the field ``host`` of `count`.
        masked_address: For the field ``masked_out`` of `spread` and `collect`: a word a rank, 1 once it was masked.
    """

    def __init__(self, *, pin: bool) -> None:
        counts_end = RECORD_WORDS + HOST_WORDS_BEFORE_EXPERTS + MAX_EXPERTS
        num_words = counts_end + MAX_RANKS
        self._memory = torch.zeros(num_words, dtype=torch.int32, pin_memory=pin)
        _kept.append(self._memory)
        self.record_address = self._memory.data_ptr()
        self.host_address = self.record_address + 4 * RECORD_WORDS
        self.masked_address = self.record_address + 4 * counts_end
        words = (ctypes.c_uint32 * num_words).from_address(self.record_address)
        self.words = memoryview(words).cast("B").cast("I")
        self.masked = self.words[counts_end:]

    @property
    def faulty(self) -> bool:
        """Whether a kernel has written a record."""
        return self.words[0] != 0

    def take_record(self) -> list[int]:
        """Return the record and clear it."""
        record = self.words[:RECORD_WORDS].tolist()
        self.words[0] = 0
        return record

    def wait_for_call_number(self, ticket: int, timeout_s: float) -> bool:
        """Wait, without the GIL, until the counts of a call are here, or a fault is; False after the deadline."""
        words, at = self.words, RECORD_WORDS
        deadline = 0.0
        while words[at] != ticket and not words[0]:
            time.sleep(0)  # lets other threads run
            now = time.monotonic()
            deadline = deadline or now + timeout_s + _STARTING_S
            if now > deadline:  # perhaps of a thread that was held up, and not of the device
                return words[at] == ticket or words[0] != 0
        return True

    def counts(self, num_ranks: int, num_local: int) -> tuple[list[int], list[int], list[int]]:
        """Rows from each rank, rows to each rank, rows of each local expert; after `wait_for_ticket`."""
        first = RECORD_WORDS + 1
        most = (HOST_WORDS_BEFORE_EXPERTS - 1) // 2
        experts = RECORD_WORDS + HOST_WORDS_BEFORE_EXPERTS
        words = self.words
        return (
            words[first : first + num_ranks].tolist(),
            words[first + most : first + most + num_ranks].tolist(),
            words[experts : experts + num_local].tolist(),
        )


class FlightRecorder:
    """The last calls, so that a record, which knows a number, can be put into words."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._calls: deque[tuple[int, Signature]] = deque(maxlen=_REMEMBERED_CALLS)

    def note(self, number: int, signature: Signature) -> None:
        """Remember a call."""
        self._calls.append((number, signature))

    def explain(self, record: list[int]) -> TokenferryError:
        """The exception that a record stands for."""
        code, number, peer, word, seen, expected, blamed, _ = record
        found = next((one for one in reversed(self._calls) if one[0] == number), None)
        call = CallId(number, found[1].phase if found else "a call")
        fields = found[1].fields if found else ()
        if code == Fault.mismatch:
            return self._mismatch(call, fields, (peer, word, seen, expected))
        if code == Fault.peer_gave_up and word == Fault.mismatch:
            return MismatchError(
                f"{call.phase} #{call.number}: rank {peer} and rank {blamed} made different calls, as rank {peer} told "
                f"rank {self._rank}; call the same on all ranks, in the same order"
            )
        if code == Fault.bad_routing:
            index = seen - (1 << 32) if seen >= 1 << 31 else seen
            return RoutingError(
                f"{call.phase}: topk_idx[{word}, {peer}] is {index}, expected an expert in [0, {expected}), or -1 for "
                f"an unused slot; the group has num_experts={expected} (found on the device, call #{call.number})"
            )
        if code == Fault.overflow:
            per_expert = " per expert" if dict(fields).get("layout") == 2 else ""
            return CapacityError(
                f"{call.phase}: options.capacity: rank {peer} received {seen} rows{per_expert}, capacity={expected}; "
                "raise it, or leave it out for the worst case"
            )
        return self._lost(call, record)

    def _lost(self, call: CallId, record: list[int]) -> PeerTimeout:
        code, _, peer, _, seen, expected, blamed, waited_ms = record
        words = {
            Fault.late_handshake: f"its handshake did not come: epoch {seen} seen, {expected} expected.",
            Fault.late_rows: f"it did not say that its rows are complete: epoch {seen} seen, {expected} expected.",
        }
        if code == Fault.peer_gave_up and blamed != self._rank:
            why = f"rank {peer} gave it up (epoch {seen} seen here, {expected} expected)."
            peer = blamed
        elif code == Fault.peer_gave_up:
            why = f"it gave up waiting for this rank (epoch {seen} seen here, {expected} expected)."
        else:
            why = words[Fault(code)]
        return peer_timeout(call, self._rank, [peer], why[:-1], waited_ms / 1000, "")

    def _mismatch(
        self, call: CallId, fields: tuple[tuple[str, int], ...], what: tuple[int, int, int, int]
    ) -> MismatchError:
        rank, (peer, word, seen, expected) = self._rank, what
        if word == ROWS_WORD:
            return MismatchError(
                f"{call.phase} #{call.number}: rank {peer} has {seen} rows for rank {rank}, whose plan says {expected};"
                " use plans of the same dispatch on all ranks"
            )
        if word == ROOM_WORD:
            return MismatchError(
                f"{call.phase} #{call.number}: rank {rank} has {expected} rows for rank {peer}, whose plan says {seen};"
                " use plans of the same dispatch on all ranks"
            )
        if word == START_WORD:
            return MismatchError(
                f"{call.phase} #{call.number}: the plan of rank {rank} names row {expected} of rank {peer}, whose rows "
                f"for it begin at {seen}; use plans of the same dispatch on all ranks"
            )
        start = f"{call.phase} #{call.number}: rank {rank} and rank {peer} made different calls"
        if not fields:  # of a call long ago, in a CUDA graph
            return MismatchError(f"{start}; call the same on all ranks, in the same order")
        if word == DISPATCH_WORD:
            return MismatchError(
                f"{start}: rank {rank} combines the rows of dispatch {expected}, rank {peer} those of dispatch {seen} "
                "(epochs); use plans of the same dispatch on all ranks"
            )
        if word == 0 or word >= len(fields):
            theirs = KINDS[seen] if 0 < seen < len(KINDS) else f"kind {seen}"
            return MismatchError(f"{start}: rank {peer} called {theirs}; call the same on all ranks, in the same order")
        name = _field_name(fields[word][0])
        mine, other = (dtype_name(value) if name == "dtype" else str(value) for value in (expected, seen))
        return MismatchError(
            f"{start}: {name} is {mine} on rank {rank} and {other} on rank {peer}; it has to be the same on all ranks"
        )
