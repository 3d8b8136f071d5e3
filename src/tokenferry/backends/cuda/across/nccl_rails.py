"""Rails over NCCL, one communicator for each rail.

A kernel of NCCL does not return while a rank is silent. So a thread watches all exchanges: when one does not end
within the deadline, counted from when its stream has reached it, or NCCL reports an error, the thread aborts the
communicator, which ends the kernels. The CUDA context stays usable. While an exchange lasts, the thread also asks
whether a rank has reported that it has given up: the ranks of a node notice at once that a process there has ended, but
ranks of other nodes only by such a report, or by the end of its connections.
"""

from __future__ import annotations

import copy
import math
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from tokenferry.backends.cuda.across.nccl import NcclError
from tokenferry.backends.cuda.across.nccl_channel import Marks, RailChannel
from tokenferry.backends.cuda.across.rails import Compare, Parts, between_nodes
from tokenferry.backends.cuda.context import Call
from tokenferry.errors import PeerTimeout, TokenferryError
from tokenferry.forked import forget_in_child
from tokenferry.topology import Topology
from tokenferry.transports.base import peer_timeout
from tokenferry.transports.failures import FailureReport, FailureReports

_POLL_S = 0.02
"""How often the thread looks at exchanges. Most end before it does, and it takes time from the calls of its process."""
_HOPELESS_S = 1.0
"""Seconds that exchanges have to end once a rank has failed, or ranks have made different calls, of different sizes."""
_ASK_S = 1.0
"""How long an exchange lasts before the reports of other ranks are asked for, and between two such questions."""
_COMPARE_S = 1.0
"""How long an exchange lasts before the headers that have come are compared, and between two such comparisons."""
_REPLAYS_S = 0.5
"""How often to query the progress of replays of graphs."""
_MOST_ASKED = 1024
"""How many exchanges of graphs are queried at a time, those of destroyed graphs included: nothing reports their end."""
_SHORT_WAIT_S = 0.002
"""How long a wait on the host polls without sleeping."""
_LONG_WAIT_POLL_S = 0.0001
_MOST_TIMEOUTS = 4
"""After how many timeouts a wait on the host gives up by itself, in case the thread does not."""
_CLOSE_S = 10.0
_LATE = "an exchange between nodes did not end"
_FAILED = "the connection between nodes failed, such as by the end of a process"


class _Exchange(NamedTuple):
    """An exchange, for error messages: its call, and its parts."""

    call: Call
    parts: Parts


@dataclass(slots=True, eq=False)
class NcclTransfer:
    """An exchange under way; see `tokenferry.backends.cuda.across.rails.Transfer`.

    Attributes:
        rails: Its rails.
        what: What it is.
        marks: Where it lies.
        kept: Keeps the memory of what is sent and received, until the stream whose memory it is waits for the exchange.
        since: When the device was first seen at it; 0: it is not.
        compare: See `Rails.exchange`.
    """

    rails: NcclRails
    what: _Exchange
    marks: Marks
    kept: object
    since: float = field(default=0.0)
    compare: Compare | None = None

    @property
    def has_ended(self) -> bool:
        """Whether everything has come and gone, or was aborted."""
        return self.marks.ended()

    def has_begun(self, now: float) -> bool:
        """Return whether the device is at it, and remember since when."""
        if self.marks.ended() or not self.marks.begun():
            self.since = 0.0
        elif not self.since:
            self.since = now
        return bool(self.since)

    def join(self) -> None:
        """See `Transfer.join`."""
        self.marks.join()
        self.kept = None

    def wait(self) -> None:
        """See `Transfer.wait`."""
        self.join()
        nothing, start = select.poll(), time.monotonic()
        while not self.has_ended:
            self.rails.raise_lost()
            waited_s = time.monotonic() - start
            if waited_s < _SHORT_WAIT_S:
                nothing.poll(0)  # releases the GIL for an instant, where the shortest sleep takes 50 us
            elif waited_s < self.rails.longest_wait_s:
                time.sleep(_LONG_WAIT_POLL_S)
            else:
                self.rails.give_up(self.what, waited_s, _LATE)
        self.rails.raise_lost()  # an aborted exchange has ended, too


class NcclRails:
    """The rails of one rank; see `tokenferry.backends.cuda.across.rails.Rails`.

    Args:
        channel: What joins the ranks of this rail.
        topology: The nodes.
        timeout_s: Seconds that an exchange may take.
        reports: Where a rank that gives up says for whom it waited.
        enter_thread: Called first in the thread that watches exchanges, and in those that compare calls.
    """

    name = "nccl"

    def __init__(
        self,
        channel: RailChannel,
        topology: Topology,
        timeout_s: float,
        *,
        reports: FailureReports | None = None,
        enter_thread: Callable[[], object] | None = None,
    ) -> None:
        self._channel = channel
        self._topology = topology
        self._timeout_s = timeout_s
        self.reports = reports
        self.lost: PeerTimeout | None = None
        # Kernels ahead of an exchange have deadlines of their own.
        self.longest_wait_s = _MOST_TIMEOUTS * timeout_s
        self._under_way: deque[NcclTransfer] = deque()
        self._in_graphs: list[NcclTransfer] = []
        self._ask_from = 0
        self._at_work: list[NcclTransfer] = []
        self._stuck: NcclTransfer | None = None
        self._replays_at = 0.0
        self._latest: _Exchange | None = None
        self._more = threading.Event()
        self._closed = self._ended = False
        self._mismatched: Callable[[], bool] = _never
        self._hopeless_since = 0.0
        self._asked = self._looked = 0.0
        self.mismatch: TokenferryError | None = None
        self._looks: list[threading.Thread] = []
        self._enter_thread = enter_thread
        # Not this object: it must be able to die. But exchanges under way hold it, and the memory that they write.
        args = (weakref.ref(self), self._under_way, channel, self._more, self._looks, enter_thread)
        self._thread = threading.Thread(target=_watch, args=args, name="tokenferry-rails", daemon=True)
        self._thread.start()
        forget_in_child(self, NcclRails.forget)

    def exchange(self, call: Call, parts: Parts, kept: object, compare: Compare | None = None) -> NcclTransfer:
        """See `Rails.exchange`.

        Raises:
            PeerTimeout: the connection to a rank has failed.
        """
        start = time.monotonic()
        what = self._latest = _Exchange(call, parts)
        try:
            marks = self._channel.start(parts, call.stream, captured=call.capturing)
        except NcclError as error:
            raise self.give_up(what, time.monotonic() - start, f"{_FAILED}: {error}") from error
        transfer = NcclTransfer(self, what, marks, kept, 0.0, compare)
        if marks.captured:  # the memory is the graph's
            self._in_graphs.append(NcclTransfer(self, what, marks, None, 0.0, compare))
        else:
            self._under_way.append(transfer)
            if not self._more.is_set():
                self._more.set()
        return transfer

    def end_soon_if(self, mismatched: Callable[[], bool]) -> None:
        """See `Rails.end_soon_if`."""
        self._mismatched = mismatched

    def raise_lost(self) -> None:
        """See `Rails.raise_lost`."""
        if self.lost is not None:
            raise copy.copy(self.lost)  # what is raised keeps the frames of the calls that it ends

    def check(self) -> bool:
        """Look at the exchanges under way, and give up if one is late or has failed; return whether there are any."""
        if self.lost is not None:
            if self._ended:
                self._under_way.clear()  # what began while all were ended
            return False
        failure = self._channel.error()
        if failure and self._latest is not None:
            self.give_up(self._latest, 0.0, f"{_FAILED}: {failure}")
            return False
        with suppress(IndexError):  # they were closed meanwhile
            now = time.monotonic()
            transfer = self._first(now)
            if transfer is None:
                return False
            self._look(transfer, now)
            mismatched = self.mismatch is not None or self._mismatched()
            if not self._hopeless_since and (mismatched or self._others_failed(transfer, now)):
                self._hopeless_since = now
            is_late = transfer.since and now - transfer.since > self._timeout_s
            is_hopeless = self._hopeless_since and now - self._hopeless_since > _HOPELESS_S
            if not is_late and not is_hopeless:
                return True
            self.give_up(transfer.what, now - (transfer.since or now), _LATE)
        return False

    def _first(self, now: float) -> NcclTransfer | None:
        """Return the exchange that the device is at, or the next one; None: there is none."""
        under_way = self._under_way
        while under_way and under_way[0].has_ended:
            under_way.popleft()
        if under_way and under_way[0].has_begun(now):
            return under_way[0]
        if self._stuck is not None and not self._stuck.has_begun(now):
            self._stuck = None
        if self._stuck is None and now > self._replays_at:
            self._replays_at = now + _REPLAYS_S
            self._stuck = self._first_of_replays(now)
            self._looked = now  # from now on every look has to find it there
        return self._stuck or (under_way[0] if under_way else None)

    def _first_of_replays(self, now: float) -> NcclTransfer | None:
        """Return an exchange of a graph that the device was at in the last look, too; None: there is none.

        Replays cannot be distinguished. But if none hangs, not every look finds a replay at the same exchange.
        """
        stuck = [each for each in self._at_work if each.has_begun(now)]
        asked = self._in_graphs[self._ask_from : self._ask_from + _MOST_ASKED]
        self._ask_from += len(asked)
        if self._ask_from >= len(self._in_graphs):
            self._ask_from = 0
        self._at_work = stuck + [each for each in asked if not each.since and each.has_begun(now)]
        return stuck[0] if stuck else None

    def _look(self, transfer: NcclTransfer, now: float) -> None:
        """Begin to compare calls, if an exchange lasts.

        In a thread: to read from the device may block where it hangs, and an exchange has to be ended all the same.
        """
        compare, since = transfer.compare, transfer.since
        if self.mismatch is not None or compare is None or not since or now - max(since, self._looked) < _COMPARE_S:
            return
        if any(look.is_alive() for look in self._looks):
            return
        self._looked = now
        args = (weakref.ref(self), self._channel, transfer, compare, self._enter_thread)
        self._looks[:] = [threading.Thread(target=_compare, args=args, name="tokenferry-compare", daemon=True)]
        self._looks[0].start()

    def finish(self) -> None:
        """See `Rails.finish`."""
        with suppress(PeerTimeout, RuntimeError):  # CUDA's: then nothing is under way any more
            for transfer in tuple(self._under_way):
                transfer.wait()

    def close(self) -> None:
        """See `Rails.close`."""
        if self._closed:
            return
        try:
            ended = all(transfer.has_ended for transfer in tuple(self._under_way))
        except RuntimeError:  # CUDA's
            ended = False
        if not ended:
            self._channel.abort()
        self._closed = True  # not before: the thread closes the channel then, and waits for what is under way
        self._under_way.clear()
        self._in_graphs.clear()
        self._more.set()
        if threading.current_thread() is not self._thread:  # the collector may run there
            self._thread.join(_CLOSE_S)  # it closes the channel

    def forget(self, _why: str) -> None:
        """Leave everything alone, in a forked child, which has no thread; see `tokenferry.forked`."""
        self._closed = True
        self._under_way.clear()

    @property
    def closed(self) -> bool:
        """Whether there is nothing to watch any more."""
        return self._closed

    def fail(self, error: RuntimeError) -> None:
        """End all exchanges after an error of CUDA on this rank. The next call would raise it, but may never come."""
        if self._latest is not None and self.lost is None:
            self.give_up(self._latest, 0.0, f"{_LATE}: {error}", FailureReport.of(error))

    def give_up(
        self, exchange: _Exchange, waited_s: float, why: str, report: FailureReport | None = None
    ) -> PeerTimeout:
        """End all exchanges, for the sake of one of them; return the error, which `raise_lost` raises from now on.

        ``report``: what is reported to other ranks, if that is not this error.
        """
        nodes = tuple(sorted({node for _, _, node, _ in exchange.parts}))
        peers = [self._topology.rail[node] for node in nodes]
        lost = peer_timeout(between_nodes(exchange.call), self._topology.rank, peers, why, waited_s, "")
        lost.nodes = nodes
        self.lost = lost
        if self.reports is not None:
            self.reports.post(report or FailureReport.of(self.mismatch or lost))
        self._channel.abort()
        self._ended = True
        self._under_way.clear()  # not before: NCCL may still write into their tensors
        return copy.copy(lost)

    def _others_failed(self, transfer: NcclTransfer, now: float) -> bool:
        """Return whether a rank has reported that it has failed, as far as this was asked."""
        if self.reports is None or not transfer.since or now - max(transfer.since, self._asked) < _ASK_S:
            return False
        come = self.reports.have_come()
        # A store that does not answer may hold each question for minutes: it is not asked again.
        self._asked = math.inf if come is None else now
        return bool(come)


def _compare(
    rails: weakref.ref[NcclRails],
    channel: RailChannel,
    transfer: NcclTransfer,
    compare: Compare,
    enter_thread: Callable[[], object] | None,
) -> None:
    """Note the mismatch if ranks have made different calls, whose exchange lasts.

    What has come is read twice, since it may be coming, and counts only if the exchange has not ended since: then its
    memory is nobody else's.
    """
    with suppress(RuntimeError):  # CUDA's, which calls meet as well
        if enter_thread is not None:
            enter_thread()
        with channel.aside():
            first = compare()
            if first is None:
                return
            time.sleep(_POLL_S)
            second, found = compare(), rails()
        if found is not None and str(second) == str(first) and not transfer.has_ended:
            found.mismatch = first


def _never() -> bool:
    return False


def _watch(
    rails: weakref.ref[NcclRails],
    _under_way: deque[NcclTransfer],
    channel: RailChannel,
    more: threading.Event,
    looks: list[threading.Thread],
    enter_thread: Callable[[], object] | None,
) -> None:
    """Watch the exchanges of a rank until its rails are closed or gone; then close the channel.

    ``_under_way``: held for as long as the thread runs; see `NcclRails`.
    """
    if enter_thread is not None:
        enter_thread()
    found = rails()
    while found is not None and not found.closed:
        del found
        if more.wait(1.0):
            time.sleep(_POLL_S)
        more.clear()  # before it looks: an exchange that begins now is seen now, or sets it again
        found = rails()
        try:
            while found is not None and not found.closed and found.check():
                time.sleep(_POLL_S)
        except RuntimeError as error:  # CUDA's; from now on `check` finds nothing to look at
            assert found is not None
            with suppress(Exception):  # even if reporting fails, the channel has to be closed
                found.fail(error)
    for look in looks:  # it reads the memory of calls
        look.join(_CLOSE_S)
    channel.close()
