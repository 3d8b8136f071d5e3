"""Exchanges of the CPU backend: one message about rows to every rank and one from each, checked to be the same call."""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.backends.base import Encoding
from tokenferry.backends.cpu.allocator import Allocator
from tokenferry.backends.cpu.routing import as_bytes, words
from tokenferry.errors import ArgumentError, ClosedError, MismatchError, PeerTimeout
from tokenferry.formats.dtypes import dtype_name
from tokenferry.layout import Sections
from tokenferry.transports.base import HEADER_INTS, CallId, Deadline, Transport

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

    def check(self, call: CallId, rank: int, src: int, header: tuple[int, ...]) -> int:
        """Return the sender's number of rows, or raise MismatchError if its call is another one."""
        start = f"{call.phase} #{call.number}: rank {rank} and rank {src} made different calls"
        kind, num_rows, *values = header
        if kind != self.kind:
            theirs = Kind(kind).name if kind in set(Kind) else f"kind {kind}"
            raise MismatchError(f"{start}: rank {src} called {theirs}; call the same on all ranks, in the same order")
        for (name, mine), other in zip(self.fields.items(), values, strict=False):
            if mine != other:
                show = _SHOW.get(name, str)
                raise MismatchError(
                    f"{start}: {name} is {show(mine)} on rank {rank} and {show(other)} on rank {src}; "
                    "it has to be the same on all ranks"
                )
        return num_rows


def _encoding_name(code: int) -> str:
    return Encoding(code).name if code in set(Encoding) else f"unknown encoding {code}"


_SHOW: dict[str, Callable[[int], str]] = {"dtype": dtype_name, "encoding": _encoding_name}
"""Fields whose numbers stand for names."""


Received = list[tuple[int, list[Tensor]]]
"""By source rank: number of rows, and per section ``[num_rows, width]`` uint8."""


class Payload:
    """What travels with each row: its data, and small things such as its ids, joined so that one copy moves them all.

    What a rank has for itself need not go through a message: it is taken from here; its entry in `Received` is empty.

    Args:
        rows: ``[rows, width]`` of any dtype.
        small: By name: ``[rows]`` or ``[rows, width]`` of any dtype, or None for what does not travel.
    """

    def __init__(self, rows: Tensor, **small: Tensor | None) -> None:
        self._rows = rows.contiguous()
        self._small = {
            name: (piece if piece.ndim == 2 else piece[:, None]).contiguous()
            for name, piece in small.items()
            if piece is not None
        }
        columns = [as_bytes(piece) for piece in self._small.values()]
        padding = -sum(piece.shape[1] for piece in columns) % 8
        self._joined = torch.cat([*columns, torch.zeros(rows.shape[0], padding, dtype=torch.uint8)], dim=1)
        self.sections = Sections((rows.shape[1] * rows.element_size(), self._joined.shape[1]))
        widths = dict(zip(self._small, (piece.shape[1] for piece in columns), strict=True))
        self.fields = {
            "bytes of rows": self.sections.widths[0],
            **{f"bytes of {name}": widths.get(name, 0) for name in small},
        }
        self._own: Tensor | slice = slice(0, 0)

    def fill(self, rows: Sequence[Tensor | slice], own: int) -> Fill:
        """Return what writes the message for each rank: the rows, and what is small, of ``rows[rank]``.

        ``rows[own]`` are this rank's own.
        """
        self._own = rows[own]

        def write(dst: int, sections: list[Tensor]) -> None:
            which = rows[dst]
            if isinstance(which, slice):
                sections[0].copy_(as_bytes(self._rows[which]))
                sections[1].copy_(self._joined[which])
                return
            for section, piece in zip(sections, (words(self._rows), words(self._joined)), strict=True):
                if section.numel():
                    torch.index_select(piece, 0, which, out=words(section))

        return write

    def rows_of(self, num_rows: int, sections: list[Tensor]) -> Tensor:
        """Return the rows of one message as ``[rows, width]``, without a copy if they are in one piece."""
        if not num_rows:
            return self._rows[:0]
        return sections[0].view(self._rows.dtype) if sections else self._rows[self._own]

    def take_rows(self, received: Received, allocator: Allocator, num_rows: int | None = None) -> Tensor:
        """Return the rows of all messages as ``[rows, width]``, copied; with ``num_rows`` the last are undefined."""
        if num_rows is None:
            num_rows = sum(num for num, _ in received)
        whole = allocator.empty(num_rows, self._rows.shape[1], dtype=self._rows.dtype)
        start = 0
        for num, sections in received:
            part = words(whole[start : start + num])
            if num and sections:
                part.copy_(words(sections[0]))
            elif num and isinstance(self._own, Tensor):
                torch.index_select(words(self._rows), 0, self._own, out=part)
            elif num:
                part.copy_(words(self._rows[self._own]))
            start += num
        return whole

    def take_small(self, received: Received) -> dict[str, Tensor]:
        """Return what is small of all messages, by name, as ``[rows, width]`` of its dtype, copied."""
        parts = [sections[1] if sections else self._joined[self._own] for num, sections in received if num]
        joined = torch.cat([self._joined[:0], *parts])
        out, start = {}, 0
        for name, piece in self._small.items():
            end = start + piece.shape[1] * piece.element_size()
            flat = joined[:, start:end].reshape(-1).clone()
            out[name] = flat.view(piece.dtype).view(joined.shape[0], piece.shape[1])
            start = end
        return out


class Exchange:
    """Makes and numbers exchanges over a transport; remembers what broke the group.

    Owns the allocator of results.

    Args:
        transport: Connected.
        timeout_s: Seconds that each exchange may wait.
        mask_on_timeout: Whether exchanges that tolerate it go on without a silent rank.

    Attributes:
        masked: Ranks that exchanges leave out if they tolerate it.
        lost: Those of them for which this rank has waited in vain.
        returns: How often ranks have come back.
    """

    def __init__(self, transport: Transport, timeout_s: float, *, mask_on_timeout: bool) -> None:
        self.transport = transport
        self.rank = transport.rank
        self.num_ranks = transport.num_ranks
        self.timeout_s = timeout_s
        self.mask_on_timeout = mask_on_timeout
        self.masked: set[int] = set()
        self.lost: set[int] = set()
        self.returns = 0
        self.broken: str | None = None
        self.allocator = Allocator()
        self._number = 0
        self._catches_up = False

    def start(
        self,
        signature: Signature,
        sections: Sections,
        counts: Sequence[int],
        fill: Fill,
        *,
        skip: frozenset[int] = frozenset(),
        copy_own: bool = False,
    ) -> Pending:
        """Send ``counts[r]`` rows to each rank r not in ``skip``; `Pending.receive` takes what the others sent.

        What this rank has for itself is not copied into a message, unless ``copy_own``: the source may be overwritten
        before it is read.
        """
        with self.guard(signature.kind.name):
            if self._catches_up:
                self._catch_up()
            self._number += 1
            call = CallId(self._number, signature.kind.name)
            copied = [0 if dst == self.rank and not copy_own else count for dst, count in enumerate(counts)]
            buffers = self.transport.open(call, [sections.num_bytes(count) for count in copied])
            for dst, (buffer, count) in enumerate(zip(buffers, copied, strict=True)):
                if count:
                    fill(dst, sections.split(buffer, count))
            headers = [signature.header(count) for count in counts]
            self.transport.post(call, headers, Deadline(self.timeout_s), skip)
            return Pending(self, call, signature, sections, skip=skip, copy_own=copy_own)

    def mask(self, rank: int) -> None:
        """Expect nothing more of a rank."""
        self.masked.add(rank)
        self.transport.forget(rank)

    def take_back(self, rank: int) -> None:
        """Expect a rank's messages again.

        If this rank has waited for it in vain, or is it, ranks may have made different numbers of calls: then it tells
        them its own number. All ranks do that between the same two calls, and take the highest for the next one.
        """
        if rank != self.rank and rank not in self.masked:
            return
        out_of_step = rank == self.rank or rank in self.lost or self._catches_up
        self.masked.discard(rank)
        self.lost.discard(rank)
        if out_of_step:
            self.returns += 1
            self._catches_up = True
            self.transport.tell_number(self._number, frozenset(self.masked))

    def _catch_up(self) -> None:
        self._catches_up = False
        self._number = max(self._number, self.transport.heard_number())
        self.transport.go_on_from(self._number)

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
            # Peers of a call that makes no sense shall hear of it too; those of a silent rank have their clocks.
            why = f"is broken by an earlier {type(error).__name__} in {phase} #{self._number}"
            self.close(why, linger=isinstance(error, MismatchError))
            raise

    def close(self, why: str, *, linger: bool) -> None:
        """Free the transport, which tells the peers; with ``linger``, after they have what was sent."""
        if not self.broken:
            self.broken = why
            self.transport.close(linger=linger)


class Pending:
    """An exchange whose messages are on their way."""

    def __init__(
        self,
        exchange: Exchange,
        call: CallId,
        signature: Signature,
        sections: Sections,
        *,
        skip: frozenset[int],
        copy_own: bool,
    ) -> None:
        self._exchange = exchange
        self._call = call
        self._signature = signature
        self._sections = sections
        self._skip = skip
        self._copy_own = copy_own
        self._returns = exchange.returns

    @property
    def number(self) -> int:
        """Of the call; the same on all ranks."""
        return self._call.number

    @property
    def void(self) -> bool:
        """Whether ranks have come back since: what was under way then is lost."""
        return self._returns != self._exchange.returns

    @contextlib.contextmanager
    def receive(
        self, wait_ns: Tensor | None = None, *, tolerant: bool = False, hooked: bool = False
    ) -> Iterator[Received]:
        """Wait for every rank's message; yields (rows, pieces) by source rank, to be read inside the ``with``.

        Args:
            wait_ns: ``[R]`` int64: nanoseconds waited for each rank are added.
            tolerant: Ranks that are masked, or become so here, give 0 rows.
            hooked: Whether peers may take this call later than this rank; see `Transport.finish`.
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
            exchange.transport.finish(call, None if hooked else deadline)

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
            message = exchange.transport.take(self._call, src, deadline, self._check)
        except PeerTimeout as error:
            if not (tolerant and exchange.mask_on_timeout):
                raise
            for peer in error.peers:
                exchange.mask(peer)
                exchange.lost.add(peer)
            return nothing
        num_rows = self._check(src, message.header)
        if src == exchange.rank and not self._copy_own:
            return num_rows, []
        return num_rows, self._sections.split(message.body, num_rows)

    def _check(self, src: int, header: tuple[int, ...]) -> int:
        return self._signature.check(self._call, self._exchange.rank, src, header)
