"""Exchanges of the CPU backend: one message about rows to every rank and one from each, checked to be the same call."""

from __future__ import annotations

import contextlib
import enum
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.backends.cpu_rows import words
from tokenferry.errors import ArgumentError, ClosedError, MismatchError, PeerTimeout
from tokenferry.layout import Sections
from tokenferry.wires.base import HEADER_INTS, Call, Deadline, Wire

Fill = Callable[[int, list[Tensor]], None]
"""Writes the message for one rank: gets the rank and, per section, ``[num_rows, width]`` uint8 to write to."""


class Kind(enum.IntEnum):
    """Which call a message belongs to."""

    dispatch = 1
    redispatch = 2
    combine = 3
    decode_dispatch = 4
    decode_combine = 5
    capacity_check = 6


@dataclass(frozen=True, slots=True)
class Signature:
    """What must be equal on all ranks for a call to make sense; travels in every header."""

    kind: Kind
    fields: dict[str, int]

    def header(self, num_rows: int) -> tuple[int, ...]:
        """The header of a message about ``num_rows`` rows."""
        values = (int(self.kind), num_rows, *self.fields.values())
        return values + (0,) * (HEADER_INTS - len(values))

    def check(self, call: Call, rank: int, src: int, header: tuple[int, ...]) -> int:
        """Return the sender's number of rows, or raise MismatchError if its call is another one."""
        start = f"{call.phase} #{call.number}: rank {rank} and rank {src} made different calls"
        kind, num_rows, *values = header
        if kind != self.kind:
            theirs = Kind(kind).name if kind in set(Kind) else f"kind {kind}"
            raise MismatchError(f"{start}: rank {src} called {theirs}; call the same on all ranks, in the same order")
        for (name, mine), other in zip(self.fields.items(), values, strict=False):
            if mine != other:
                show = _dtype_name if name == "dtype" else str
                raise MismatchError(
                    f"{start}: {name} is {show(mine)} on rank {rank} and {show(other)} on rank {src}; "
                    "it has to be the same on all ranks"
                )
        return num_rows


def dtype_code(dtype: torch.dtype) -> int:
    """A number for a dtype that is the same on all ranks, whatever their versions of torch."""
    return zlib.crc32(str(dtype).encode())


def _dtype_name(code: int) -> str:
    dtypes = [d for d in vars(torch).values() if isinstance(d, torch.dtype)]
    return next((str(d) for d in dtypes if dtype_code(d) == code), f"unknown dtype {code}")


Received = list[tuple[int, list[Tensor]]]
"""By source rank: number of rows, and per section ``[num_rows, width]`` uint8."""


class Payload:
    """The pieces that travel with each row, such as its data, its scale and its ids.

    Args:
        pieces: By name: ``[rows]`` or ``[rows, width]`` of any dtype, or None for a piece that does not travel.
    """

    def __init__(self, **pieces: Tensor | None) -> None:
        self._pieces = {
            name: (piece if piece.ndim == 2 else piece[:, None]).contiguous()
            for name, piece in pieces.items()
            if piece is not None
        }
        widths = {name: piece.shape[1] * piece.element_size() for name, piece in self._pieces.items()}
        self.sections = Sections(tuple(widths.values()))
        self.fields = {f"bytes of {name}": widths.get(name, 0) for name in pieces}

    def fill(self, rows: Sequence[Tensor | slice]) -> Fill:
        """Return what writes, for each rank, the pieces of ``rows[rank]``."""

        def write(dst: int, sections: list[Tensor]) -> None:
            which = rows[dst]
            for piece, section in zip(self._pieces.values(), sections, strict=True):
                if isinstance(which, slice):
                    section.copy_(piece[which].view(torch.uint8))
                elif section.numel():
                    torch.index_select(words(piece), 0, which, out=words(section))

        return write

    def take(self, received: Received, name: str, num_rows: int | None = None) -> Tensor | None:
        """Return one piece of all messages as ``[rows, width]`` of its dtype, copied; None if it did not travel.

        With ``num_rows`` it has that many rows, the last ones undefined.
        """
        if name not in self._pieces:
            return None
        piece, section = self._pieces[name], list(self._pieces).index(name)
        if num_rows is None:
            num_rows = sum(num for num, _ in received)
        whole = torch.empty(num_rows, piece.shape[1], dtype=piece.dtype)
        start = 0
        for num, sections in received:
            if num:
                words(whole[start : start + num]).copy_(words(sections[section]))
            start += num
        return whole


class Exchange:
    """Makes exchanges over a wire, numbers them, and remembers what broke the group.

    Args:
        wire: Connected.
        timeout_s: Seconds that each exchange may wait.
        mask_on_timeout: Whether exchanges that tolerate it go on without a silent rank.
    """

    def __init__(self, wire: Wire, timeout_s: float, *, mask_on_timeout: bool) -> None:
        self.wire = wire
        self.rank = wire.rank
        self.num_ranks = wire.num_ranks
        self.timeout_s = timeout_s
        self.mask_on_timeout = mask_on_timeout
        self.masked: set[int] = set()
        self.broken: str | None = None
        self._number = 0

    def start(
        self,
        signature: Signature,
        sections: Sections,
        counts: Sequence[int],
        fill: Fill,
        skip: frozenset[int] = frozenset(),
    ) -> Pending:
        """Send ``counts[r]`` rows to each rank r not in ``skip``; `Pending.receive` takes what the others sent."""
        with self.guard(signature.kind.name):
            self._number += 1
            call = Call(self._number, signature.kind.name)
            buffers = self.wire.open(call, [sections.num_bytes(count) for count in counts])
            for dst, (buffer, count) in enumerate(zip(buffers, counts, strict=True)):
                if count:
                    fill(dst, sections.split(buffer, count))
            headers = [signature.header(count) for count in counts]
            self.wire.post(call, headers, Deadline(self.timeout_s), skip)
            return Pending(self, call, signature, sections, skip)

    def mask(self, rank: int) -> None:
        """Expect nothing more of a rank."""
        self.masked.add(rank)
        self.wire.forget(rank)

    @contextlib.contextmanager
    def guard(self, phase: str) -> Iterator[None]:
        """Mark the group as broken by anything but a bad argument: its ranks are then out of step."""
        if self.broken:
            raise ClosedError(f"{phase}: the group {self.broken}; make a new ExpertGroup")
        try:
            yield
        except ArgumentError:
            raise
        except BaseException as error:
            self.close(f"is broken by an earlier {type(error).__name__} in {phase} #{self._number}", linger=False)
            raise

    def close(self, why: str, *, linger: bool) -> None:
        """Free the wire, which tells the peers; with ``linger``, after they have what was sent."""
        if not self.broken:
            self.broken = why
            self.wire.close(linger=linger)


class Pending:
    """An exchange whose messages are on their way."""

    def __init__(
        self, exchange: Exchange, call: Call, signature: Signature, sections: Sections, skip: frozenset[int]
    ) -> None:
        self._exchange = exchange
        self._call = call
        self._signature = signature
        self._sections = sections
        self._skip = skip

    @contextlib.contextmanager
    def receive(
        self, wait_ns: Tensor | None = None, *, tolerant: bool = False, hooked: bool = False
    ) -> Iterator[Received]:
        """Wait for every rank's message; yields (rows, pieces) by source rank, to be read inside the ``with``.

        Args:
            wait_ns: ``[R]`` int64: nanoseconds waited for each rank are added.
            tolerant: Ranks that are masked, or become so here, give 0 rows.
            hooked: Whether peers may take this call later than this rank; see `Wire.finish`.
        """
        exchange, call = self._exchange, self._call
        with exchange.guard(call.phase):
            deadline = Deadline(exchange.timeout_s)
            received: Received = []
            for src in range(exchange.num_ranks):
                start = time.perf_counter_ns()
                received.append(self._take(src, deadline, tolerant=tolerant))
                if wait_ns is not None and src != exchange.rank:
                    wait_ns[src] += time.perf_counter_ns() - start
            yield received
            exchange.wire.finish(call, None if hooked or tolerant else deadline)

    def check_counts(self, received: Received, expected: Sequence[int]) -> None:
        """Raise MismatchError if a rank sent another number of rows than the plan says."""
        for src, ((num_rows, _), wanted) in enumerate(zip(received, expected, strict=True)):
            if num_rows != wanted:
                call, rank = self._call, self._exchange.rank
                raise MismatchError(
                    f"{call.phase} #{call.number}: rank {src} sent {num_rows} rows to rank {rank}, whose plan says "
                    f"{wanted}; use plans of the same dispatch on all ranks"
                )

    def _take(self, src: int, deadline: Deadline, *, tolerant: bool) -> tuple[int, list[Tensor]]:
        exchange = self._exchange
        nothing = (0, self._sections.split(torch.empty(0, dtype=torch.uint8), 0))
        if src in self._skip or (tolerant and src in exchange.masked):
            return nothing
        try:
            message = exchange.wire.take(self._call, src, deadline)
        except PeerTimeout as error:
            if not (tolerant and exchange.mask_on_timeout):
                raise
            for peer in error.peers:
                exchange.mask(peer)
            return nothing
        num_rows = self._signature.check(self._call, exchange.rank, src, message.header)
        return num_rows, self._sections.split(message.body, num_rows)
