"""What a chaos soak promises, checked on the reports of its ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

from tokenferry.testing.chaos_crew import Violation
from tokenferry.testing.chaos_plan import STARVED, Episode, FaultKind
from tokenferry.testing.chaos_reports import CallReport, Report

PROMPT_S = 5.0
"""Seconds within which a lost rank is noticed where that happens at once; a busy machine needs some."""
SLACK_S = 10.0
"""Seconds by which a busy machine may exceed a deadline."""
SILENT = "no answer within timeout_s"


class Judge:
    """Holds the reports of one episode to its promises.

    Args:
        episode: The episode.

    Attributes:
        hurt: The ranks that something has happened to, and what.
        broke: The ranks whose groups are broken or closed.
        made: The number of the call in which the group of a rank broke.
    """

    def __init__(self, episode: Episode) -> None:
        self._episode = episode
        self.hurt: dict[int, FaultKind] = {}
        self.broke: set[int] = set()
        self.made: dict[int, int] = {}

    def died(self, rank: int, status: int) -> None:
        """Check that a process that has ended had a reason to.

        Raises:
            Violation: it had none.
        """
        kind = self.hurt.get(rank)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status)
        if kind in ("kill", "fork and kill") and killed == signal.SIGKILL:
            return
        # Without memory even the C++ runtime and the stack of a thread may fail, which ends a process.
        if kind == "no memory" and killed in (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS):
            return
        raise Violation(f"rank {rank} ended with status {status}")

    def step(self, reports: Mapping[int, Report]) -> None:
        """Check what the ranks report of a step.

        Raises:
            Violation: a promise is broken.
        """
        for rank, report in reports.items():
            failed = [one for one in report.calls if one.error]
            if failed or report.left:
                self.broke.add(rank)
                self.made[rank] = max([self.made.get(rank, -1), *(one.number for one in failed)])
        for rank, report in sorted(reports.items()):
            if report.wrong:
                raise Violation(f"rank {rank}: {report.wrong}")
            for one in report.calls:
                self._call(rank, one)
            blamed = report.masked - self.hurt.keys() - self.broke
            if blamed and rank not in self.hurt:
                raise Violation(f"rank {rank} masked {sorted(blamed)}, which answered; hurt: {self.hurt}")

    def aftermath(self, reports: Mapping[int, Report]) -> None:
        """Check that all ranks that go on have noticed that a rank is lost; after `step`.

        Raises:
            Violation: a rank has not.
        """
        starved = all(kind in STARVED for kind in self.hurt.values())
        if self._episode.on_timeout == "mask" or (starved and not self.broke):
            return
        unaware = sorted(rank for rank in reports if rank not in self.broke)
        if unaware:
            raise Violation(f"rank(s) {unaware} made calls without {self.hurt} as if nothing had happened")

    def _call(self, rank: int, one: CallReport) -> None:
        where = f"rank {rank}, {one.name} after {one.took_s:.2f} s"
        if not one.expected:
            raise Violation(f"{where}: {one.error}:\n{one.text}")
        if rank not in self.hurt and one.took_s > self._episode.timeout_s + SLACK_S:
            raise Violation(f"{where}: past its deadline of {self._episode.timeout_s:g} s ({one.error or 'returned'})")
        if not one.error:
            return
        what = f"{where}: {one.error}: {one.text}"
        if not self.hurt:
            raise Violation(f"{what}\nno rank was lost")
        if rank in self.hurt and self.hurt[rank] in STARVED:
            return
        if rank not in self.hurt and self._episode.prompt and one.took_s > PROMPT_S:
            raise Violation(f"{what}\nthe others were to notice {self.hurt} at once")
        if one.error == "PeerTimeout":
            self._blame(rank, one, what)
        elif not (one.name == "making" and one.error == "BackendUnavailable") and rank not in self.hurt:
            raise Violation(f"{what}\na rank that loses a peer reports PeerTimeout")

    def _blame(self, rank: int, one: CallReport, what: str) -> None:
        innocent = sorted(set(one.peers) - self.hurt.keys() - self.broke)
        if innocent:
            raise Violation(f"{what}\nrank(s) {innocent} answered; hurt: {self.hurt}")
        # gloo drops what a rank has sent, when that rank gives this one up.
        dropped = rank in self.hurt and self._episode.transport == "process_group"
        if SILENT not in one.text or self._episode.num_groups > 1 or dropped:
            return
        # A rank that broke off in a later call, or in this one, has sent what belongs to this one.
        answered = sorted(
            peer for peer in one.peers if peer not in self.hurt and self.made.get(peer, -1) >= one.number > 0
        )
        if answered:
            raise Violation(f"{what}\nrank(s) {answered} had sent what belongs to this call; hurt: {self.hurt}")
