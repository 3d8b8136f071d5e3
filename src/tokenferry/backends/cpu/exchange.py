"""Exchanges of the CPU backend: every rank sends each rank a message and checks that all ranks make the same call."""

from __future__ import annotations

import contextlib
import enum
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tokenferry.ambient import not_compiled
from tokenferry.backends.base import CLOSED, Encoding
from tokenferry.backends.cpu.allocator import Allocator
from tokenferry.backends.cpu.entrance import Entered, Entrance
from tokenferry.backends.cpu.payload import Outgoing, ReceivedRows
from tokenferry.errors import ArgumentError, ClosedError, MismatchError, PeerTimeout, ResourceError, TokenferryError
from tokenferry.forked import forget_in_child
from tokenferry.formats.dtypes import dtype_name
from tokenferry.transports.base import HEADER_INTS, CallId, Deadline, Transport
from tokenferry.transports.failures import FailureReport, FailureReports, patience_s
from tokenferry.transports.refused import resource_error


class CallKind(enum.IntEnum):
    """The call that a message belongs to."""

    dispatch = 1
    redispatch = 2
    combine = 3
    decode_dispatch = 4
    decode_combine = 5
    capacity_check = 6


PLAN_FIELD = "dispatch of the plan"
"""The field of a signature with the number of the call that made the plan. 0: not known; it is compared with none."""


@dataclass(frozen=True, slots=True)
class Signature:
    """The properties of a call that must be equal on all ranks; every header carries them.

    ``leg`` says which of the exchanges of a call this is, if it has several.
    """

    kind: CallKind
    fields: dict[str, int]
    leg: str = ""

    @property
    def phase(self) -> str:
        """The name of the call, and of the leg, for error messages."""
        return f"{self.kind.name} ({self.leg})" if self.leg else self.kind.name

    def header(self, num_rows: int, note: int, *, hooked: bool) -> tuple[int, ...]:
        """Return the header of a message about ``num_rows`` rows, whose sender receives in a hook or at once.

        The note is its last number.
        """
        values = (int(self.kind), num_rows, int(hooked), *self.fields.values())
        assert len(values) < HEADER_INTS
        return values + (0,) * (HEADER_INTS - 1 - len(values)) + (note,)

    def check(self, call: CallId, rank: int, src: int, header: tuple[int, ...]) -> tuple[int, bool]:
        """Return the number of rows that ``src`` sent, and whether it receives in a hook.

        Raises:
            MismatchError: ``src`` made another call than this rank.
        """
        start = f"{call.phase} #{call.number}: rank {rank} and rank {src} made different calls"
        kind, num_rows, hooked, *values = header
        if kind != self.kind:
            theirs = CallKind(kind).name if kind in set(CallKind) else f"kind {kind}"
            raise MismatchError(f"{start}: rank {src} called {theirs}; call the same on all ranks, in the same order")
        for (name, mine), other in zip(self.fields.items(), values, strict=False):
            if mine != other and not (name == PLAN_FIELD and 0 in (mine, other)):
                show = _SHOW.get(name, str)
                raise MismatchError(
                    f"{start}: {name} is {show(mine)} on rank {rank} and {show(other)} on rank {src}; "
                    "it has to be the same on all ranks"
                )
        return num_rows, bool(hooked)


def _encoding_name(code: int) -> str:
    return Encoding(code).name if code in set(Encoding) else f"unknown encoding {code}"


_SHOW: dict[str, Callable[[int], str]] = {"dtype": dtype_name, "encoding": _encoding_name}
"""Fields whose values are codes, and the functions that turn them into names."""


@contextlib.contextmanager
def counted(wait_ns: Tensor | None, ranks: Sequence[int]) -> Iterator[None]:
    """Add the nanoseconds that the block takes to the counters of some ranks, if there are counters."""
    start = time.perf_counter_ns()
    yield
    if wait_ns is not None:
        for rank in ranks:
            wait_ns[rank] += time.perf_counter_ns() - start


class Exchange:
    """Numbers the calls of a group, runs them over a transport, and remembers the error that broke the group.

    Owns the allocator of results.

    Args:
        transport: A connected transport.
        timeout_s: Seconds that each exchange may wait.
        mask_on_timeout: Whether a tolerant `Pending.receive` masks a silent rank instead of raising.
        reports: With several nodes: where ranks that give up say why. Then a part of ``timeout_s`` is for learning who
            is at fault; see `tokenferry.transports.failures.patience_s`.

    Attributes:
        masked: Ranks that decode calls skip.
        lost: The masked ranks that this rank masked itself, after a timeout.
        num_masked: By rank, how often it was masked: what was under way from it is lost, also if it is back by now.
        num_resyncs: How often the ranks have resynchronised their call numbers.
        entrance: Lets calls and hooks in.
    """

    def __init__(
        self,
        transport: Transport,
        timeout_s: float,
        *,
        mask_on_timeout: bool,
        reports: FailureReports | None = None,
    ) -> None:
        self.transport = transport
        self.rank = transport.rank
        self.num_ranks = transport.num_ranks
        self._reports = reports
        self._in_all_s = timeout_s
        self.timeout_s = timeout_s if reports is None else timeout_s - patience_s(timeout_s, timeout_s)
        self.mask_on_timeout = mask_on_timeout
        self.masked: set[int] = set()
        self.lost: set[int] = set()
        self.num_masked = [0] * self.num_ranks
        self.num_resyncs = 0
        self.broken: str | None = None
        self.allocator = Allocator()
        self._last_call = 0
        self.entrance = Entrance()
        self._resync_due = False
        self._postponed: tuple[str, Callable[[Deadline], None]] | None = None
        self._forgotten: deque[CallId] = deque()
        forget_in_child(self, Exchange._forget)

    def start(
        self,
        signature: Signature,
        outgoing: Outgoing,
        *,
        skip: frozenset[int] = frozenset(),
        copy_own: bool = False,
        hooked: bool = False,
        deadline: Deadline | None = None,
    ) -> Pending:
        """Send each rank not in ``skip`` its rows; `Pending.receive` waits for those of the others.

        With ``copy_own``, this rank's own rows are copied into a message too: needed if their source may be
        overwritten before it is read. With ``hooked``, this rank receives after other calls. ``deadline`` is that of a
        call of several exchanges.
        """
        with self.guard(signature.phase):
            if self._resync_due:
                self._resynchronise()
            while self._forgotten:
                self.transport.forget(self._forgotten.popleft())
            self._last_call += 1
            call = CallId(self._last_call, signature.phase)
            sections, counts = outgoing.payload.sections, outgoing.counts
            copied = [0 if dst == self.rank and not copy_own else count for dst, count in enumerate(counts)]
            buffers = self.transport.open(call, [sections.num_bytes(count) for count in copied])
            for rows, buffer, count in zip(outgoing.rows, buffers, copied, strict=True):
                if buffer.numel():
                    outgoing.payload.write(rows, sections.split(buffer, count))
            headers = [signature.header(count, outgoing.note, hooked=hooked) for count in counts]
            self.transport.post(call, headers, deadline or Deadline(self.timeout_s), skip)
            return Pending(self, call, signature, outgoing, skip=skip, copy_own=copy_own, hooked=hooked)

    @property
    def last_call(self) -> int:
        """The number of the last exchange that was started; the same on all ranks in a call that all make."""
        return self._last_call

    def forget(self, call: CallId) -> None:
        """Leave to the next call to finish one that nobody will receive. From any thread, at any time."""
        self._forgotten.append(call)

    def postpone(self, phase: str, work: Callable[[Deadline], None]) -> None:
        """Leave to `catch_up` what a call has yet to do for its peers, once it may wait for them."""
        self._postponed = phase, work

    def catch_up(self, deadline: Deadline | None = None) -> None:
        """Do what was postponed; every call and every hook begins with it.

        So at most one call has something to do, and all ranks make their exchanges in the same order.
        """
        if self._postponed is not None:
            phase, work = self._postponed
            with self.guard(phase):
                self._postponed = None
                work(deadline or Deadline(self.timeout_s))

    def mask(self, rank: int) -> None:
        """Expect no more messages of a rank."""
        self.masked.add(rank)
        self.num_masked[rank] += 1
        self.transport.drop_peer(rank)

    def unmask(self, rank: int) -> None:
        """Expect messages of a rank again.

        If this rank has lost that rank, or is that rank itself, the ranks may have made different numbers of calls.
        Then they resynchronise: each announces the number of its last call, all between the same two calls, and the
        next call continues from the highest number.
        """
        if rank != self.rank and rank not in self.masked:
            return
        resync = rank == self.rank or rank in self.lost or self._resync_due
        self.masked.discard(rank)
        self.lost.discard(rank)
        if resync:
            self.num_resyncs += 1
            self._postponed = None
            self._resync_due = True
            self.transport.announce_call(self._last_call, frozenset(self.masked))

    def _resynchronise(self) -> None:
        self._resync_due = False
        self._last_call = max(self._last_call, self.transport.highest_announced_call())
        self.transport.skip_to(self._last_call)

    @contextlib.contextmanager
    def guard(self, phase: str) -> Iterator[None]:
        """Break the group on any error but a wrong argument: its ranks may have made different calls."""
        if self.broken:
            raise ClosedError(f"{phase}: the group {self.broken}; make a new ExpertGroup")
        try:
            yield
        except ArgumentError:
            raise
        except BaseException as error:
            self._fail(phase, error)
            raise

    @contextlib.contextmanager
    def call(self, phase: str) -> Iterator[None]:
        """Do what was postponed, then a call; after its first message, break the group unless the error is ours.

        Otherwise an interrupt between two exchanges of a call, or after the last one, would leave this rank a call
        behind its peers. Errors of ours (`TokenferryError`) have already broken the group if they have to.
        `interrupted` handles an interrupt that comes while this block is entered or left.
        """
        entered = Entered()
        try:
            self.entrance.enter(phase, entered)
            self.catch_up()
            entered.before = self._last_call
            yield
            self.entrance.leave(entered)  # here, not behind the handler, where an interrupt would pass it by
        except BaseException as error:
            self._end_early(phase, entered, error)
            raise

    def interrupted(self, phase: str, before: Entered, error: BaseException) -> None:
        """End what has entered since ``before`` was the latest, if its own handlers did not see ``error``."""
        entered = self.entrance.since(before)
        if entered is not None:
            torch._C._set_grad_enabled(entered.grad_enabled)  # an interrupt of `no_grad` leaves them off
            self._end_early(phase, entered, error)

    def _end_early(self, phase: str, entered: Entered, error: BaseException) -> None:
        self.entrance.leave(entered)
        if not isinstance(error, TokenferryError) and entered.before not in (None, self._last_call):
            self._fail(phase, error)

    def _fail(self, phase: str, error: BaseException) -> None:
        """Break the group, unless an inner block has; raise the most informative error, if that is not ``error``."""
        where = f"{phase} #{self._last_call}"
        if self.broken == CLOSED and isinstance(error, Exception) and not isinstance(error, ClosedError):
            # Another thread or a signal handler has closed it, and the call has failed for want of what `close` freed.
            raise ClosedError(f"{where}: the group {CLOSED} during the call; make a new ExpertGroup") from error
        if self.broken:
            return
        if isinstance(error, GeneratorExit):  # an interrupt came while a `with` block was being entered or left
            error = KeyboardInterrupt()
        raised = self.refused(where, error) or self._break(where, error)
        try:
            if raised is not error:
                raise raised from error
        finally:
            del raised, error  # a cycle through this frame would keep the memory of calls alive

    def refused(self, where: str, error: BaseException) -> ResourceError | None:
        """Break the group if ``error`` means that a resource was refused, and return the error to raise instead."""
        refused = resource_error(f"{where}: rank {self.rank}", error)
        if refused is not None:
            self._break(where, refused)
        return refused

    def _break(self, where: str, error: BaseException) -> BaseException:
        """Notify the peers, close, and return the error to raise: with several nodes it names the rank at fault.

        Peers are not notified after a timeout, since they time out themselves, nor after an interrupt, which must not
        wait.
        """
        if self.broken:
            return error
        raised, tell = error, isinstance(error, Exception) and not isinstance(error, PeerTimeout)
        try:
            if self._reports is not None:
                raised = self._report(self._reports, error)
            elif tell and not isinstance(error, MismatchError):  # peers need the header of a mismatch to see it, too
                with contextlib.suppress(OSError, MemoryError, RuntimeError):  # there may be no memory for a message
                    self.transport.leave(f"{type(error).__name__}: {error}", wait=True)
        finally:  # even if notifying them failed, or was interrupted
            self.close(f"is broken by an earlier {type(raised).__name__} in {where}", linger=tell)
        return raised

    def _report(self, reports: FailureReports, error: BaseException) -> BaseException:
        """Say why this rank gives up, end all waits for it, and return the error to raise.

        To wait until `Transport.leave` has notified all peers would take long: its message is part of the next
        exchange, which goes to few of them. The others read the report in the store.
        """
        start, report = time.monotonic(), FailureReport.of(error)
        with contextlib.suppress(OSError, MemoryError):
            self.transport.leave(report.text(), wait=False)
        if isinstance(error, Exception):
            reports.post(report)
        if isinstance(error, MismatchError):
            self.transport.close(linger=True)  # peers need its headers to see the mismatch, too
        self.transport.abandon()
        if not isinstance(error, PeerTimeout):
            return error
        return reports.explain(error, start + patience_s(self._in_all_s, error.waited_s), self.transport.reason)

    def _forget(self, reason: str) -> None:
        """End the group in a forked child, without a sign to its peers. The transport closes its own descriptors."""
        self.broken = self.broken or reason
        self.entrance = Entrance()  # a thread of the parent may be inside, which does not exist in the child

    def close(self, why: str, *, linger: bool) -> None:
        """Close the transport, which the peers notice; with ``linger``, only after they have what was sent."""
        if not self.broken:
            self.broken = why
            self.transport.close(linger=linger)
            self.allocator.close()


class Pending:
    """An exchange whose messages were posted and not yet received."""

    _received = True  # there is nothing to forget of one that was interrupted while it was made

    def __init__(
        self,
        exchange: Exchange,
        call: CallId,
        signature: Signature,
        outgoing: Outgoing,
        *,
        skip: frozenset[int],
        copy_own: bool,
        hooked: bool,
    ) -> None:
        self._exchange = exchange
        self._call = call
        self._signature = signature
        self._sections = outgoing.payload.sections
        self._own = outgoing.rows[exchange.rank]
        self._skip = skip
        self._copy_own = copy_own
        self._hooked = hooked
        self._late: set[int] = set()
        self._num_masked = list(exchange.num_masked)
        self._num_resyncs = exchange.num_resyncs
        self._received = False

    @not_compiled  # runs wherever a program drops a hook
    def __del__(self) -> None:
        if not self._received:  # such as that of a hook that was never called
            self._exchange.forget(self._call)

    @property
    def number(self) -> int:
        """The number of the call, the same on all ranks."""
        return self._call.number

    @property
    def aborted(self) -> bool:
        """Whether the ranks have resynchronised since: the messages of this exchange are lost."""
        return self._num_resyncs != self._exchange.num_resyncs

    def lacks(self, src: int) -> bool:
        """Return whether a rank sends nothing: it was left out, is masked, or was masked since this exchange began."""
        masked, num_masked = self._exchange.masked, self._exchange.num_masked
        return src in self._skip or src in masked or num_masked[src] != self._num_masked[src]

    @contextlib.contextmanager
    def receive(
        self,
        wait_ns: Tensor | None = None,
        *,
        tolerant: bool = False,
        deadline: Deadline | None = None,
    ) -> Iterator[list[ReceivedRows]]:
        """Wait for every rank's message; yields the rows by source rank, to be read inside the ``with`` block.

        Args:
            wait_ns: ``[R]`` int64; the nanoseconds waited for each rank are added.
            tolerant: Masked ranks, and with ``mask_on_timeout`` silent ones, count as having sent no rows.
            deadline: That of a call of several exchanges.
        """
        with self.receive_each(tolerant=tolerant, deadline=deadline) as take:
            received: dict[int, ReceivedRows] = {}
            for src in self._exchange.transport.order:
                with counted(wait_ns, [src] if src != self._exchange.rank else []):
                    received[src] = take(src)
            yield [received[src] for src in range(self._exchange.num_ranks)]

    @contextlib.contextmanager
    def receive_each(
        self, *, tolerant: bool = False, deadline: Deadline | None = None
    ) -> Iterator[Callable[[int], ReceivedRows]]:
        """Yield a function that waits for the message of one rank; the arguments are those of `receive`."""
        exchange, call = self._exchange, self._call
        with exchange.guard(call.phase):
            deadline = deadline or Deadline(exchange.timeout_s)
            yield partial(self._receive_from, deadline=deadline, tolerant=tolerant)
            exchange.transport.finish(call, None if self._hooked else deadline, frozenset(self._late))
            self._received = True

    def check_counts(self, received: Sequence[ReceivedRows], expected: Sequence[int]) -> None:
        """Check that each rank sent the number of rows in the plan.

        Raises:
            MismatchError: a rank sent another number of rows.
        """
        for src, (source, count) in enumerate(zip(received, expected, strict=True)):
            self.check_count(src, source.num_rows, count)

    def check_count(self, src: int, num_rows: int, expected: int) -> None:
        """Check that one rank sent the number of rows in the plan; as `check_counts`."""
        if num_rows != expected:
            call, rank = self._call, self._exchange.rank
            raise MismatchError(
                f"{call.phase} #{call.number}: rank {src} sent {num_rows} rows to rank {rank}, whose plan says "
                f"{expected}; use plans of the same dispatch on all ranks"
            )

    def _receive_from(self, src: int, deadline: Deadline, *, tolerant: bool) -> ReceivedRows:
        exchange = self._exchange
        nothing = ReceivedRows(0, self._sections.split(torch.empty(0, dtype=torch.uint8, device="cpu"), 0))
        if src in self._skip:
            return nothing
        while not (tolerant and self.lacks(src)):
            try:
                message = exchange.transport.receive(self._call, src, deadline, self._check)
                break
            except PeerTimeout as error:
                if not (tolerant and exchange.mask_on_timeout):
                    raise
                for peer in error.peers:  # not always `src`: another one may be known to be gone
                    exchange.mask(peer)
                    exchange.lost.add(peer)
        else:
            return nothing
        num_rows, late = self._check(src, message.header)
        if late:
            self._late.add(src)
        note = message.header[-1]
        if src == exchange.rank and not self._copy_own:
            return ReceivedRows(num_rows, [], self._own, note)
        return ReceivedRows(num_rows, self._sections.split(message.body, num_rows), note=note)

    def _check(self, src: int, header: tuple[int, ...]) -> tuple[int, bool]:
        return self._signature.check(self._call, self._exchange.rank, src, header)
