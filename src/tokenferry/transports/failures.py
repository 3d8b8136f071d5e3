"""Failure reports: ranks that give up report for whom they waited, so that each of them can name the rank at fault.

With several nodes a rank waits for few others, each of which may wait itself for the one that is lost. It would name
its neighbour, which has done nothing wrong. So a rank that gives up reports for whom it waited, to the ranks of its
node and in the store of the process group, before it closes its connections. Then it follows the reports of the others
to the ranks that have not reported.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from tokenferry.errors import MismatchError, PeerTimeout
from tokenferry.topology import Topology
from tokenferry.transports.base import advice
from tokenferry.transports.store import ask

_POLL_S = 0.05
_MOST_APART_S = 10.0
_NOTICED_S = 1.0
_T = TypeVar("_T")


def patience_s(timeout_s: float, waited_s: float) -> float:
    """Return the seconds for which a rank that gives up waits for the reports of others.

    Ranks whose deadlines expire may have begun the call at different times: one that began early must not take for lost
    another one that still waits. But what ranks notice, such as the end of a process, they notice at the same time.

    Args:
        timeout_s: The deadline of the group.
        waited_s: How long the rank has waited; more than half of the deadline: it has expired.
    """
    apart_s = min(_MOST_APART_S, timeout_s / 4)
    return apart_s if waited_s > timeout_s / 2 else min(_NOTICED_S, apart_s)


@dataclass(frozen=True, slots=True)
class FailureReport:
    """What a rank posts when it gives up.

    Attributes:
        peers: The ranks for which it waited.
        mismatch: If ranks made different calls: the message that says so.
        left: If it failed by itself: its error.
        call: The number of the call in which it waited.
    """

    peers: tuple[int, ...] = ()
    mismatch: str = ""
    left: str = ""
    call: int = 0

    @classmethod
    def of(cls, error: BaseException) -> FailureReport:
        """Return the report of a rank that gives up with this error."""
        if isinstance(error, PeerTimeout):
            return cls(error.peers, call=error.call)
        if isinstance(error, MismatchError):
            return cls(mismatch=str(error))
        return cls(left=f"{type(error).__name__}: {error}")

    def text(self) -> str:
        """Return what `parse` reads; up to the null character it is for people."""
        return f"{self.left or self.mismatch or f'it waited for {_ranks(self.peers)}'}\0{json.dumps(asdict(self))}"

    @classmethod
    def parse(cls, text: str) -> FailureReport | None:
        """Return the report with this text; None if it is not whole, as that of a rank that could not send all."""
        try:
            fields = json.loads(text.partition("\0")[2])
        except ValueError:
            return None
        return cls(**{**fields, "peers": tuple(fields["peers"])})


def _ranks(ranks: Sequence[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in ranks)


class FailureReports:
    """The reports of the ranks of a group. Without a store that answers, a rank knows only what it has seen.

    Args:
        group: A process group; its store holds the reports.
        group_id: Tells the groups on one process group apart; the same on all ranks.
        topology: The nodes.
    """

    def __init__(self, group: dist.ProcessGroup, group_id: int, topology: Topology) -> None:
        self._store: Store | None = None
        with contextlib.suppress(RuntimeError):  # not made by torch.distributed
            self._store = group.get_group_store()
        self._prefix = f"tokenferry/failures/{group_id}"
        self._any = f"{self._prefix}/any"
        self._topology = topology

    def post(self, report: FailureReport) -> None:
        """Report why this rank gives up, before its peers notice. Takes a second at most."""
        text = report.text()

        def post(store: Store) -> None:
            store.set(self._key(self._topology.rank), text)
            store.set(self._any, "1")  # last: whoever sees it finds the report

        self._ask(post, None)

    def have_come(self) -> bool | None:
        """Return whether any rank has reported; None if the store does not answer within a second."""
        store = self._store
        answers = [] if store is None else ask(lambda: store.check([self._any]))
        return answers[0] if answers else None

    def explain(self, error: PeerTimeout, until: float, reason: Callable[[int], str]) -> PeerTimeout | MismatchError:
        """Return the error to raise in place of one that this rank has met: it names the ranks at fault.

        Args:
            error: What this rank has met.
            until: When to stop waiting for the reports of ranks that may be about to give up, too (`time.monotonic`).
            reason: Returns the text with which a rank has left, if this rank has it; see `Transport.reason`.
        """
        cause = self._cause(FailureReport.of(error), until, reason)
        waited_for = _ranks(error.peers)
        where, rank = f"{error.phase} #{error.call}", error.rank
        if cause.mismatch:
            return MismatchError(f"{where}: rank {rank} waited for {waited_for}; the cause: {cause.mismatch}")
        at_fault = ", ".join(f"rank {peer} on node {self._topology.node_of(peer)}" for peer in cause.peers)
        behind = "" if cause.peers == error.peers else f", for which {waited_for} waited"
        why = f": {cause.left.removesuffix('.')}" if cause.left else ""
        met = str(error).removesuffix(advice()).rstrip(" .")
        last = f" {advice()}" if str(error).endswith(advice()) else ""
        return PeerTimeout(
            f"{met}. The cause is {at_fault}{behind}{why}.{last}",
            phase=error.phase,
            call=error.call,
            rank=rank,
            peers=cause.peers,
            waited_s=error.waited_s,
            nodes=tuple(sorted({self._topology.node_of(peer) for peer in cause.peers})),
        )

    def _cause(self, report: FailureReport, until: float, reason: Callable[[int], str]) -> FailureReport:
        """Return what is at the ends of all chains of waits that begin with a report: ranks, or a mismatch."""
        while True:
            last = time.monotonic() >= until  # looked up first: a store that is gone takes a second of this look
            found = self._follow(report, reason)
            if found.mismatch or found.left or last:
                return found
            time.sleep(_POLL_S)

    def _follow(self, report: FailureReport, reason: Callable[[int], str], *, by_call: bool = False) -> FailureReport:
        """Return what is at the ends of the chains for now; ``by_call``: see `_break_circle`."""
        seen, ends, todo = {self._topology.rank}, set[int](), [(peer, report.call) for peer in report.peers]
        while todo:
            rank, call = todo.pop()
            if rank in seen:
                continue
            seen.add(rank)
            other = self._read(rank, reason)
            if other is None or (by_call and other.peers and other.call > call):
                ends.add(rank)
            elif other.mismatch:
                return other
            elif other.left:
                return FailureReport((rank,), left=other.left)
            else:
                todo += [(peer, other.call) for peer in other.peers]
        if ends:
            return FailureReport(tuple(sorted(ends)))
        return report if by_call else self._break_circle(report, seen, reason)

    def _break_circle(self, report: FailureReport, seen: set[int], reason: Callable[[int], str]) -> FailureReport:
        """Return what is at the end of a circle of waits, in which nobody is silent.

        Perhaps its ranks wait for each other because of what another rank has seen. Else something was lost between two
        of them: the one that should have sent it has gone on, and waits in a later call.
        """
        others = (self._read(rank, reason) for ranks in self._topology.nodes for rank in ranks if rank not in seen)
        mismatch = next((other for other in others if other is not None and other.mismatch), None)
        return mismatch or self._follow(report, reason, by_call=True)

    def _read(self, rank: int, reason: Callable[[int], str]) -> FailureReport | None:
        with contextlib.suppress(OSError, MemoryError):
            report = FailureReport.parse(reason(rank))
            if report is not None:
                return report
        key = self._key(rank)
        answer = self._ask(lambda store: store.get(key) if store.check([key]) else b"", b"")
        return FailureReport.parse(answer.decode(errors="replace"))

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"

    def _ask(self, question: Callable[[Store], _T], otherwise: _T) -> _T:
        """Return the answer of the store, or ``otherwise`` if there is none in time; then it is not asked again."""
        store = self._store
        answers = [] if store is None else ask(lambda: question(store))
        if not answers:
            self._store = None
            return otherwise
        return answers[0]
