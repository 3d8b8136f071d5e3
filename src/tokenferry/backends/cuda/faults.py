"""Reports of kernels to the host, in pinned memory: the record of the first fault, and the counts of a dispatch.

Kernels never trap and never throw: they write a record and return. The host reads it when it waits for counts, at the
start of every call, and in `ExpertGroup.synchronize`.
"""

from __future__ import annotations

import ctypes
import math
import select
import time
from collections import deque
from dataclasses import dataclass, replace

import torch

from tokenferry.backends.cuda.signature import KINDS, Signature, field_label
from tokenferry.errors import CapacityError, MismatchError, PeerTimeout, RoutingError, TokenferryError
from tokenferry.formats.dtypes import dtype_name
from tokenferry.kernels.codes import MASKED
from tokenferry.kernels.control_block import (
    CAPACITY_WORD,
    DISPATCH_WORD,
    ENDED_WORD,
    HOST_EXPERTS_WORD,
    HOST_MOST_WORD,
    HOST_RECEIVED_WORD,
    HOST_SENT_WORD,
    HOST_UNITS_WORD,
    MAX_EXPERTS,
    MAX_RANKS,
    NOTHING_CAME,
    RAIL_SPACE_WORD,
    RECORD_WORDS,
    ROWS_WORD,
    SIZES_WORD,
    START_WORD,
    Fault,
)
from tokenferry.transports.base import CallId, peer_timeout

_REMEMBERED_CALLS = 64
_SHORT_WAIT_S = 0.0002
"""How long a wait on the host polls without sleeping."""
_SLEEP_S = 1e-6
"""Asks for the shortest sleep there is; 0 would be none in Python 3.10."""
_STARTING_S = 1.0
"""Added to a deadline on the host: kernels have their own, which begins when they start."""

_LATE: dict[int, str] = {
    Fault.late_handshake: "its handshake did not come",
    Fault.late_rows: "it did not signal that its rows are complete",
    Fault.peer_ended: "its process ended",
    Fault.peer_closed: "it closed the group",
}
"""Why a peer is late, by fault."""
_GONE = (Fault.peer_ended, Fault.peer_closed)
_MISMATCHES = (Fault.mismatch, Fault.node_mismatch)
_INT32 = torch.iinfo(torch.int32)
_OF_THE_ROUTING = (Fault.bad_routing, Fault.too_many_nodes)
"""Faults about a token of this rank, whose records name no other rank."""
_IN_STEP = (*_OF_THE_ROUTING, Fault.overflow, Fault.node_overflow)
"""Faults that leave all ranks in step: kernels record them, and do not notify peers."""

_kept_pinned: list[torch.Tensor] = []
"""Pinned memory of all groups of the process. It is never freed: a kernel that writes it may still be queued, or belong
to a CUDA graph, when its group is gone."""


def pinned_words(num_words: int, *, pin: bool) -> torch.Tensor:
    """Return words of zero that kernels write and the host reads. They are never freed.

    Args:
        num_words: How many words of 32 bits.
        pin: Whether to pin them; kernels that run on the CPU reach any memory.
    """
    memory = torch.zeros(num_words, dtype=torch.int32, pin_memory=pin, device="cpu")
    _kept_pinned.append(memory)
    return memory


def view_words(memory: torch.Tensor) -> memoryview:
    """Return a view of what `pinned_words` returned, which the host reads without a call of torch."""
    words = (ctypes.c_uint32 * memory.numel()).from_address(memory.data_ptr())
    return memoryview(words).cast("B").cast("I")


@dataclass(frozen=True, slots=True)
class Record:
    """A fault as a kernel writes it: the first `ENDED_WORD` words of the record, in order.

    Attributes:
        code: The fault, a value of `Fault`.
        call_number: Number of the call that found it.
        peer: The other rank; for a bad routing, the slot k.
        word: Which word of the handshake differs; for a bad routing, the token.
        seen: What was found.
        expected: What should have been found.
        blamed: The rank that the peer waited for.
        waited_ms: How long this rank waited.
    """

    code: int
    call_number: int
    peer: int
    word: int
    seen: int
    expected: int
    blamed: int
    waited_ms: int


class Pinned:
    """Pinned memory that kernels write and the host reads: a record, then the number of a call and its counts.

    One word goes the other way: the host notes there whose processes have ended.

    Args:
        pin: Whether to pin it; kernels that run on the CPU reach any memory.

    Attributes:
        record_address: For the field ``record`` of params.
        host_address: For the field ``host`` of `dispatch_notify`.
        masked_address: For the field ``masked_out`` of the decode kernels: a word for each rank, 1 once it was masked.
        words: All words.
        masked: The words at ``masked_address``.
        ended: One word, with a bit for each rank whose process has ended; see `tokenferry.backends.cuda.peers`.
    """

    def __init__(self, *, pin: bool) -> None:
        counts_end = RECORD_WORDS + HOST_EXPERTS_WORD + MAX_EXPERTS
        num_words = counts_end + MAX_RANKS
        self._memory = pinned_words(num_words, pin=pin)
        self.words, self.record_address = view_words(self._memory), self._memory.data_ptr()
        self.host_address = self.record_address + 4 * RECORD_WORDS
        self.masked_address = self.record_address + 4 * counts_end
        self._counts = self.words[RECORD_WORDS:counts_end]
        self.masked = self.words[counts_end:]
        self.ended = self.words[ENDED_WORD : ENDED_WORD + 1]

    @property
    def faulty(self) -> bool:
        """Whether a kernel has written a record."""
        return self.words[0] != 0

    @property
    def gave_up(self) -> bool:
        """Whether a kernel has written a record and notified the peers: that of a fault which breaks the group."""
        return self.words[0] not in (0, *_IN_STEP)

    def mismatched(self) -> bool:
        """Return whether the record says that ranks have made different calls."""
        code = self.words[0]
        return code in _MISMATCHES or (code == Fault.peer_gave_up and self._record().word in _MISMATCHES)

    def take_record(self) -> Record:
        """Return the record and clear it."""
        record = self._record()
        self.words[0] = 0
        return record

    def overflowed(self, number: int) -> bool:
        """Return whether the record says that the rows of a call did not fit."""
        return self.words[0] == Fault.overflow and self._record().call_number == number

    def wait_for_call_number(self, number: int, timeout_s: float) -> bool:
        """Wait, without the GIL, until the counts of a call or a fault are here; return False after the deadline.

        Counts come within microseconds, and the shortest sleep takes 50 us. So a short wait polls no descriptor at all,
        which releases the GIL for an instant; a longer one sleeps, and leaves GIL and core to other threads.
        """
        return self.wait_for(self._counts, number, timeout_s)

    def wait_for(self, counted: memoryview, number: int, timeout_s: float) -> bool:
        """Wait as `wait_for_call_number`, for words of pinned memory that begin with the number of a call."""
        words = self.words
        if counted[0] == number and not words[0]:
            return True
        nothing, start = select.poll(), time.monotonic()
        while counted[0] != number and not words[0]:
            waited_s = time.monotonic() - start
            if waited_s < _SHORT_WAIT_S:
                nothing.poll(0)
            else:
                time.sleep(_SLEEP_S)
            if waited_s > timeout_s + _STARTING_S:  # look once more: perhaps this thread was held up, not the device
                return counted[0] == number or words[0] != 0
        return True

    def counts(self, num_ranks: int, num_local: int) -> tuple[int, int, bytes]:
        """Return rows from all ranks, rows to all ranks, words with those of each local expert; once they have come."""
        words = self._counts
        return (
            sum(words[HOST_RECEIVED_WORD : HOST_RECEIVED_WORD + num_ranks]),
            sum(words[HOST_SENT_WORD : HOST_SENT_WORD + num_ranks]),
            words[HOST_EXPERTS_WORD : HOST_EXPERTS_WORD + num_local].tobytes(),
        )

    @property
    def most_received(self) -> int:
        """Rows that the fullest rank needs space for, the same on all ranks; after `wait_for_call_number`."""
        return self.words[RECORD_WORDS + HOST_MOST_WORD]

    @property
    def most_units(self) -> int:
        """Across nodes: units of the longest segment of any rank of this node; after `wait_for_call_number`."""
        return self.words[RECORD_WORDS + HOST_UNITS_WORD]

    def _record(self) -> Record:
        return Record(*self.words[:ENDED_WORD].tolist())


class FlightRecorder:
    """The last calls of a rank; a record has only a call's number, and a message needs its name and fields.

    Args:
        rank: This rank, as kernels count.
        first_rank: The rank of the group that kernels call 0: the first of this node.
    """

    def __init__(self, rank: int, first_rank: int = 0) -> None:
        self.first_rank = first_rank
        self.rank = first_rank + rank
        self._calls: deque[tuple[int, Signature]] = deque(maxlen=_REMEMBERED_CALLS)

    def note(self, number: int, signature: Signature) -> None:
        """Remember a call."""
        self._calls.append((number, signature))

    def explain(self, record: Record) -> TokenferryError:
        """Return the exception for a record."""
        signature = next((found for number, found in reversed(self._calls) if number == record.call_number), None)
        call = CallId(record.call_number, signature.phase if signature else "a call")
        if record.code == Fault.node_mismatch:
            word = CAPACITY_WORD if record.word == RAIL_SPACE_WORD else record.word
            return self._mismatch(call, signature, replace(record, peer=record.blamed, word=word))
        if record.code == Fault.node_overflow:
            return CapacityError(
                f"{call.phase}: rank {record.peer} has {record.seen} tokens for one other node, more than "
                f"node_slots={record.expected}; send fewer at once, or make the group with "
                f"MoeShape(node_slots={record.seen})"
            )
        if record.code not in _OF_THE_ROUTING:
            record = replace(record, peer=record.peer + self.first_rank, blamed=record.blamed + self.first_rank)
        peer, seen, expected = record.peer, record.seen, record.expected
        if record.code == Fault.mismatch:
            return self._mismatch(call, signature, record)
        if record.code == Fault.peer_gave_up and record.word in _MISMATCHES:
            other = f"rank {record.blamed}" if record.word == Fault.mismatch else "a rank of another node"
            return MismatchError(
                f"{call.phase} #{call.number}: rank {peer} and {other} made different calls, as rank "
                f"{peer} reported to rank {self.rank}; call the same on all ranks, in the same order"
            )
        if record.code == Fault.bad_routing:
            return RoutingError(
                f"{call.phase}: topk_idx[{record.word}, {peer}] is {_index_of(seen)}, expected an expert in "
                f"[0, {expected}), or -1 for an unused slot; the group has num_experts={expected} (found on the "
                f"device, call #{call.number})"
            )
        if record.code == Fault.too_many_nodes:
            return RoutingError(
                f"{call.phase}: topk_idx[{record.word}] has experts on {seen} nodes, expected at most {expected}; the "
                f"group has max_nodes={expected}: limit the groups of the router, or make the group with "
                f"MoeShape(max_nodes={seen}) (found on the device, call #{call.number})"
            )
        if record.code == Fault.overflow:
            fields = {} if signature is None else dict(signature.fields)
            if fields.get("capacity") == 0:
                times = math.ceil(100 * seen / expected) / 100
                return CapacityError(
                    f"{call.phase}: rank {peer} received {seen} rows, and its heap has room for {expected} at most; "
                    f"make it at least {times:.2f} times as large with TOKENFERRY_HEAP_MB, or send fewer tokens at once"
                )
            where = f"{'an expert of ' if fields.get('layout') == MASKED else ''}rank {peer}"
            return CapacityError(
                f"{call.phase}: options.capacity: {where} received {seen} rows, capacity={expected}; "
                "raise it, or leave it out for the worst case"
            )
        return self._timeout(call, record)

    def _timeout(self, call: CallId, record: Record) -> PeerTimeout:
        peer, seen, expected = record.peer, record.seen, record.expected
        if record.code == Fault.node_gave_up:
            nothing = record.seen == NOTHING_CAME
            why = "nothing came" if nothing else "it gave up, and what it sent is undefined"
            return peer_timeout(call, self.rank, [record.word], why, 0.0, "")
        if record.code == Fault.late_node:
            why = f"nothing came: exchange {seen} seen, {expected} expected"
            return peer_timeout(call, self.rank, [record.word], why, record.waited_ms / 1000, "")
        if record.code != Fault.peer_gave_up:
            why = f"{_LATE[record.code]}: epoch {seen} seen, {expected} expected"
        else:
            if record.blamed == self.rank:
                why = "it gave up waiting for this rank"
            elif record.word in _GONE:
                why = f"{_LATE[record.word]}, as rank {peer} found"
            else:
                why = f"rank {peer} gave it up"
            why += f" (epoch {seen} seen here, {expected} expected)"
            peer = peer if record.blamed == self.rank else record.blamed
        return peer_timeout(call, self.rank, [peer], why, record.waited_ms / 1000, "")

    def _mismatch(self, call: CallId, signature: Signature | None, record: Record) -> MismatchError:
        rank, peer, word = self.rank, record.peer, record.word
        seen, expected = record.seen, record.expected
        if word == ROWS_WORD:
            return MismatchError(
                f"{call.phase} #{call.number}: rank {peer} has {seen} rows for rank {rank}, whose plan says {expected};"
                " use plans of the same dispatch on all ranks"
            )
        if word == CAPACITY_WORD:
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
        if signature is None:  # a call in a CUDA graph, captured long ago
            return MismatchError(f"{start}; call the same on all ranks, in the same order")
        if word == SIZES_WORD:
            return MismatchError(
                f"{start}: the memory for rows under way, which the first call of a size makes, takes "
                f"{128 * expected} bytes on rank {rank} where it takes {128 * seen} on rank {peer}; call the same on "
                "all ranks, in the same order"
            )
        if word == 0 and seen == expected:
            return MismatchError(
                f"{start}: it is the first of its size for rank {rank}, and not for rank {peer}; call the same on all "
                "ranks, in the same order"
            )
        if word == DISPATCH_WORD:
            return MismatchError(
                f"{start}: rank {rank} combines the rows of dispatch {expected}, rank {peer} those of dispatch {seen} "
                "(epochs); use plans of the same dispatch on all ranks"
            )
        fields = signature.fields
        if word == 0 or word >= len(fields):
            theirs = KINDS[seen] if 0 < seen < len(KINDS) else f"kind {seen}"
            return MismatchError(f"{start}: rank {peer} called {theirs}; call the same on all ranks, in the same order")
        label = field_label(fields[word][0])
        mine, other = (dtype_name(value) if label == "dtype" else str(value) for value in (expected, seen))
        return MismatchError(
            f"{start}: {label} is {mine} on rank {rank} and {other} on rank {peer}; it has to be the same on all ranks"
        )


def _index_of(word: int) -> str:
    """Return the index that a kernel has written into a word as int32, the nearest one if it is int64."""
    index = word - (1 << 32) if word >= 1 << 31 else word
    return {_INT32.max: f"{index} or more", _INT32.min: f"{index} or less"}.get(index, str(index))
