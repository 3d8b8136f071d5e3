"""Rails over NCCL, one communicator for each rail, from `torch.distributed`.

A kernel of NCCL does not return while a rank is silent. So a thread looks after all exchanges: when one does not end
within the deadline, counted from when its stream has reached it, the thread aborts the communicator, which ends the
kernels. The CUDA context stays usable. While an exchange lasts, the thread also asks whether a rank has reported that
it has given up: the ranks of a node notice at once that a process there has ended, those of other nodes only so.
"""

from __future__ import annotations

import math
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.backends.cuda.across.rails import Parcels
from tokenferry.errors import PeerTimeout
from tokenferry.forked import forget_in_child
from tokenferry.topology import Topology
from tokenferry.transports.base import CallId, peer_timeout
from tokenferry.transports.failures import FailureReport, FailureReports

_POLL_S = 0.002
_HOPELESS_S = 1.0
"""Seconds that exchanges have to end once a rank has failed, or ranks have made different calls, of different sizes."""
_ASK_S = 1.0
"""How long an exchange lasts before the reports of other ranks are asked for, and between two such questions."""
_SHORT_WAIT_S = 0.0002
"""How long a wait on the host polls without sleeping."""


class Work(Protocol):
    """The part of ``torch.distributed.Work`` that is used here."""

    def is_completed(self) -> bool: ...  # noqa: D102
    def wait(self) -> object: ...  # noqa: D102


@dataclass(slots=True, eq=False)
class NcclTransfer:
    """An exchange under way; see `tokenferry.backends.cuda.across.rails.Transfer`.

    Attributes:
        rails: Its rails.
        call: Its call.
        peers: The ranks that take part, without this one.
        works: What torch knows of it.
        begun: Returns whether its stream has reached it.
        since: When it was first seen to have begun; 0: not yet.
        tensors: Keeps what is sent and received.
    """

    rails: NcclRails
    call: CallId
    peers: tuple[int, ...]
    works: Sequence[Work]
    begun: Callable[[], bool]
    tensors: list[Tensor]
    since: float = field(default=0.0)

    @property
    def has_ended(self) -> bool:
        """Whether everything has come and gone."""
        return all(work.is_completed() for work in self.works)

    def join(self) -> None:
        """See `Transfer.join`."""
        for work in self.works:
            work.wait()

    def wait(self) -> None:
        """See `Transfer.wait`."""
        nothing, start = select.poll(), time.monotonic()
        while not self.has_ended:
            self.rails.raise_lost()
            if time.monotonic() - start < _SHORT_WAIT_S:
                nothing.poll(0)  # releases the GIL for an instant, where the shortest sleep takes 50 us
            else:
                time.sleep(_POLL_S / 20)
        self.rails.raise_lost()  # an aborted exchange has ended, too
        self.join()


class NcclRails:
    """The rails of one rank; see `tokenferry.backends.cuda.across.rails.Rails`.

    Args:
        group: The ranks of this rail, in the order of nodes.
        topology: The nodes.
        timeout_s: Seconds that an exchange may take.
        reports: Where a rank that gives up says for whom it waited.
        enter_thread: Called first in the thread that looks after exchanges.
    """

    name = "nccl"

    def __init__(
        self,
        group: dist.ProcessGroup,
        topology: Topology,
        timeout_s: float,
        *,
        reports: FailureReports | None = None,
        enter_thread: Callable[[], object] | None = None,
    ) -> None:
        self._group = group
        self._topology = topology
        self._timeout_s = timeout_s
        self.reports = reports
        self.lost: PeerTimeout | None = None
        self._under_way: deque[NcclTransfer] = deque()
        self._more = threading.Event()
        self._closed = False
        self._mismatched: Callable[[], bool] = _never
        self._hopeless_since = 0.0
        self._asked = 0.0
        args = (weakref.ref(self), self._more, enter_thread)  # not this object: it must be able to die
        threading.Thread(target=_look_after, args=args, name="tokenferry-rails", daemon=True).start()
        forget_in_child(self, NcclRails.forget)

    def exchange(self, call: CallId, send: Parcels, recv: Parcels) -> NcclTransfer:
        """See `Rails.exchange`."""
        tensors = [tensor for parcels in (recv, send) for each in parcels.values() for tensor in each]
        peers = tuple(sorted({self._topology.rail[node] for node in (*send, *recv)}))
        begun = _marked(tensors)
        works = self._start(send, recv) if tensors else []
        transfer = NcclTransfer(self, call, peers, works, begun or _never, tensors)
        if works and begun is not None:
            self._under_way.append(transfer)
            self._more.set()
        return transfer

    def end_soon_if(self, mismatched: Callable[[], bool]) -> None:
        """See `Rails.end_soon_if`."""
        self._mismatched = mismatched

    def raise_lost(self) -> None:
        """See `Rails.raise_lost`."""
        if self.lost is not None:
            raise self.lost

    def check(self) -> bool:
        """Look at the exchanges under way, and give up if one is late; return whether there are any."""
        under_way = self._under_way
        with suppress(IndexError):  # they were closed meanwhile
            while under_way[0].has_ended:
                under_way.popleft()
            transfer, now = under_way[0], time.monotonic()
            if not transfer.since and transfer.begun():
                transfer.since = now
            if not self._hopeless_since and (self._mismatched() or self._others_failed(transfer, now)):
                self._hopeless_since = now
            is_late = transfer.since and now - transfer.since > self._timeout_s
            is_hopeless = self._hopeless_since and now - self._hopeless_since > _HOPELESS_S
            if not is_late and not is_hopeless:
                return True
            self._give_up(transfer, now - (transfer.since or now))
        return False

    def close(self) -> None:
        """See `Rails.close`."""
        if self._closed:
            return
        self._closed = True
        if not all(transfer.has_ended for transfer in tuple(self._under_way)):
            self._abort()
        self._under_way.clear()
        self._more.set()

    def forget(self, _why: str) -> None:
        """Leave everything alone, in a forked child, which has no thread; see `tokenferry.forked`."""
        self._closed = True
        self._under_way.clear()

    @property
    def closed(self) -> bool:
        """Whether nothing is to be looked after any more."""
        return self._closed

    def _others_failed(self, transfer: NcclTransfer, now: float) -> bool:
        """Return whether a rank has reported that it has failed, as far as this was asked."""
        if self.reports is None or not transfer.since or now - max(transfer.since, self._asked) < _ASK_S:
            return False
        come = self.reports.have_come()
        # A store that does not answer may hold each question for minutes: it is not asked again.
        self._asked = math.inf if come is None else now
        return bool(come)

    def _give_up(self, transfer: NcclTransfer, waited_s: float) -> None:
        rank, why = self._topology.rank, "an exchange between nodes did not end"
        lost = peer_timeout(transfer.call, rank, transfer.peers, why, waited_s, "")
        lost.nodes = tuple(sorted({self._topology.node_of(peer) for peer in transfer.peers}))
        self.lost = lost
        if self.reports is not None:
            self.reports.post(FailureReport.of(lost))
        self._abort()
        self._under_way.clear()  # not before: NCCL may still write into their tensors

    def _start(self, send: Parcels, recv: Parcels) -> Sequence[Work]:
        works: Sequence[Work] = dist.batch_isend_irecv(
            [
                dist.P2POp(operation, tensor, group=self._group, group_peer=node)
                for operation, parcels in ((dist.irecv, recv), (dist.isend, send))
                for node, tensors in parcels.items()
                for tensor in tensors
            ]
        )
        return works

    def _abort(self) -> None:
        self._group.abort()


def _marked(tensors: Sequence[Tensor]) -> Callable[[], bool] | None:
    """Return what tells whether the current stream has reached this point; None: a CUDA graph captures it."""
    if not tensors or tensors[0].device.type != "cuda":
        return _at_once
    if torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event.query


def _at_once() -> bool:
    return True


def _never() -> bool:
    return False


def _look_after(
    rails: weakref.ref[NcclRails], more: threading.Event, enter_thread: Callable[[], object] | None
) -> None:
    """Look after the exchanges of a rank until its rails are closed or gone."""
    if enter_thread is not None:
        enter_thread()
    while True:
        more.wait(1.0)
        more.clear()
        found = rails()
        while found is not None and not found.closed and found.check():
            time.sleep(_POLL_S)
        if found is None or found.closed:
            return
        del found
