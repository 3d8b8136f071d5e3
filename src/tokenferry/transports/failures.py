"""Failure reports: ranks that give up say for whom they waited, so that each of them can name the rank at fault.

With several nodes a rank waits for few others, each of which may wait itself for the one that is lost. It would name
its neighbour, which has done nothing wrong. So a rank that gives up posts for whom it waited, in the store of the
process group, before it closes its connections, and follows what the others have posted to those who have not.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from tokenferry.errors import MismatchError, PeerTimeout
from tokenferry.topology import Topology

_POLL_S = 0.05
_STORE_S = 1.0
"""Seconds for one question to the store, whose own waits may take minutes if its host is gone."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class FailureReport:
    """What a rank posts when it gives up.

    Attributes:
        peers: The ranks for which it waited.
        mismatch: If ranks made different calls: the message that says so.
        left: If it failed by itself: its error.
    """

    peers: tuple[int, ...] = ()
    mismatch: str = ""
    left: str = ""

    @classmethod
    def of(cls, error: Exception) -> FailureReport:
        """Return the report of a rank that gives up with this error."""
        if isinstance(error, PeerTimeout):
            return cls(error.peers)
        if isinstance(error, MismatchError):
            return cls(mismatch=str(error))
        return cls(left=f"{type(error).__name__}: {error}")


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
        self._topology = topology

    def post(self, error: Exception) -> None:
        """Report the error with which this rank gives up, before its peers notice. Takes a second at most."""
        text = json.dumps(asdict(FailureReport.of(error)))
        self._ask(lambda store: store.set(self._key(self._topology.rank), text), None)

    def explain(self, error: PeerTimeout, patience_s: float) -> PeerTimeout | MismatchError:
        """Return the error to raise in place of one that this rank has met: it names the ranks at fault.

        Args:
            error: What this rank has met.
            patience_s: Seconds to wait for the reports of ranks that may be about to give up, too.
        """
        cause = self._cause(FailureReport(error.peers), patience_s)
        waited_for = ", ".join(f"rank {peer}" for peer in error.peers)
        where, rank = f"{error.phase} #{error.call}", error.rank
        if cause.mismatch:
            return MismatchError(f"{where}: rank {rank} waited for {waited_for}; the cause: {cause.mismatch}")
        at_fault = ", ".join(f"rank {peer} on node {self._topology.node_of(peer)}" for peer in cause.peers)
        behind = "" if cause.peers == error.peers else f", for which {waited_for} waited"
        why = f": {cause.left}" if cause.left else "."
        return PeerTimeout(
            f"{error} The cause is {at_fault}{behind}{why}",
            phase=error.phase,
            call=error.call,
            rank=rank,
            peers=cause.peers,
            waited_s=error.waited_s,
            nodes=tuple(sorted({self._topology.node_of(peer) for peer in cause.peers})),
        )

    def _cause(self, report: FailureReport, patience_s: float) -> FailureReport:
        """Return what is at the ends of all chains of waits that begin with a report: ranks, or a mismatch."""
        end = time.monotonic() + patience_s
        while True:
            found = self._follow(report)
            if found.mismatch or found.left or self._store is None or time.monotonic() >= end:
                return found
            time.sleep(_POLL_S)

    def _follow(self, report: FailureReport) -> FailureReport:
        seen, ends, todo = {self._topology.rank}, set[int](), list(report.peers)
        while todo:
            rank = todo.pop()
            if rank in seen:
                continue
            seen.add(rank)
            other = self._read(rank)
            if other is None:
                ends.add(rank)
            elif other.mismatch:
                return other
            elif other.left:
                return FailureReport((rank,), left=other.left)
            else:
                todo += other.peers
        if ends:
            return FailureReport(tuple(sorted(ends)))
        # In a circle nobody is silent: perhaps they wait for each other because of what another rank has seen.
        others = (self._read(rank) for ranks in self._topology.nodes for rank in ranks if rank not in seen)
        return next((other for other in others if other is not None and other.mismatch), report)

    def _read(self, rank: int) -> FailureReport | None:
        key = self._key(rank)
        text = self._ask(lambda store: store.get(key) if store.check([key]) else b"", b"")
        if not text:
            return None
        fields = json.loads(text)
        return FailureReport(tuple(fields["peers"]), fields["mismatch"], fields["left"])

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"

    def _ask(self, question: Callable[[Store], _T], otherwise: _T) -> _T:
        """Return the answer of the store, or ``otherwise`` if there is none in time; then it is not asked again."""
        store = self._store
        if store is None:
            return otherwise
        answers: list[_T] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError, OSError):
                answers.append(question(store))

        thread = threading.Thread(target=ask, name="tokenferry failure reports", daemon=True)
        with contextlib.suppress(RuntimeError, MemoryError):  # no thread is to be had
            thread.start()
            thread.join(_STORE_S)
        if not answers:
            self._store = None
            return otherwise
        return answers[0]
