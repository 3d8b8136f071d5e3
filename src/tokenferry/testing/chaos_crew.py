"""The processes of one episode of a chaos soak: forked, watched, hurt and ended by their supervisor."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from tokenferry.testing.chaos_plan import Fault
from tokenferry.testing.chaos_rank import Rank
from tokenferry.testing.chaos_reports import Report

_TICK_S = 0.05
_CHILD_S = 5.0
"""Seconds within which a forked child has to find out that its groups are not its own."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Violation(Exception):  # noqa: N818 - a promise that was not kept
    """A promise was not kept; the message says which, by whom and where."""


@dataclass(slots=True, eq=False)
class _Member:
    """One process.

    Attributes:
        pid: Its process id.
        pipe: The connection to it.
        status: What `os.waitpid` said when it had ended; None: it lives.
        stopped: Whether it is stopped until further notice.
        owed: Commands that it has not answered.
        inbox: Reports that came while nobody waited for them.
    """

    pid: int
    pipe: Connection
    status: int | None = None
    stopped: bool = False
    owed: int = 0
    inbox: list[Report] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class _Event:
    """Something that the supervisor does at some time; it may return another such event."""

    at: float
    act: Callable[[], _Event | None]


class Crew:
    """R processes, each with a pipe; a context manager, after which none of them is left.

    Args:
        ranks: R.
        folder: A folder for what forked children leave.
    """

    def __init__(self, ranks: int, folder: Path) -> None:
        self._folder = folder
        self._members: list[_Member] = []
        for number in range(ranks):
            ours, theirs = Pipe()
            pid = os.fork()
            if pid == 0:
                ours.close()
                for member in self._members:
                    member.pipe.close()
                _run_rank(theirs, folder, number)
            theirs.close()
            self._members.append(_Member(pid, ours))

    def alive(self) -> list[int]:
        """Return the ranks whose processes live, stopped ones too."""
        return [number for number, member in enumerate(self._members) if member.status is None]

    def status(self, rank: int) -> int | None:
        """Return the wait status of a process that has ended, or None."""
        return self._members[rank].status

    def stopped(self) -> frozenset[int]:
        """Return the ranks that are stopped until `wake`."""
        return frozenset(number for number, member in enumerate(self._members) if member.stopped)

    def wake(self) -> list[int]:
        """Let all stopped ranks go on, and return those that were stopped in the middle of something."""
        woken = [self._members[rank] for rank in sorted(self.stopped())]
        for member in woken:
            member.stopped = False
            os.kill(member.pid, signal.SIGCONT)
        return [rank for rank, member in enumerate(self._members) if member in woken and member.owed]

    def send(self, ranks: Iterable[int], message: object) -> None:
        """Send a command to some ranks."""
        for rank in ranks:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._members[rank].pipe.send(message)
                self._members[rank].owed += 1

    def collect(self, ranks: Iterable[int], within_s: float, faults: Iterable[Fault] = ()) -> dict[int, Report]:
        """Return the report of each of these ranks that neither dies nor is stopped, and cause faults meanwhile.

        Raises:
            Violation: a rank does not answer.
        """
        start = time.monotonic()
        events = [_Event(start + fault.delay_s, self._begin(fault)) for fault in faults if fault.kind in _OUTSIDE]
        waiting, found = set(ranks), dict[int, Report]()
        while True:
            now = time.monotonic()
            for event in [event for event in events if event.at <= now]:
                events.remove(event)
                following = event.act()
                if following is not None:
                    events.append(following)
            self._look(waiting, found)
            waiting -= self.stopped()
            if not waiting and not events:
                return found
            if now > start + within_s:
                raise Violation(
                    f"rank(s) {sorted(waiting)} did not return within {within_s:.1f} s{self._stacks(waiting)}"
                )
            sooner = min([event.at for event in events], default=now + _TICK_S)
            timeout = max(0.0, min(_TICK_S, sooner - now))
            wait([self._members[rank].pipe for rank in waiting] or [], timeout) if waiting else time.sleep(timeout)

    def children(self) -> list[str]:
        """Return what forked children found wrong, once all of them have had the time to find it."""
        deadline = time.monotonic() + _CHILD_S
        while (hung := list(self._folder.glob("child *.tmp"))) and time.monotonic() < deadline:
            time.sleep(0.01)
        found = [note.read_text() for note in self._folder.glob("child *[0-9]")]
        return [text for text in found if text] + [f"{note.stem} does not come to the end of a call" for note in hung]

    def end(self) -> list[str]:
        """End all processes, and return what was left behind: processes that nobody asked for."""
        for member in self._members:
            member.pipe.close()
        deadline = time.monotonic() + 5.0
        while self.alive() and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.005)
        left = [f"rank {rank} did not end" for rank in self.alive()]
        self._kill_all()
        known = {int(note.name.split()[2].removesuffix(".tmp")) for note in self._folder.glob("child *")}
        for pid in known:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        for pid in _orphans():
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == 0 and pid not in known:
                    left.append(f"process {pid} was left behind")
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
        return left

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill_all()
        self.end()

    # ------------------------------------------------------------------ faults

    def _begin(self, fault: Fault) -> Callable[[], _Event | None]:
        """Return a function that causes a fault; it returns the event by which the fault ends."""
        member = self._members[fault.rank]

        def signalled(number: signal.Signals) -> None:
            self._reap()
            if member.status is None:
                os.kill(member.pid, number)

        def kill() -> None:
            signalled(signal.SIGKILL)

        def stop() -> None:
            signalled(signal.SIGSTOP)
            member.stopped = member.status is None

        def late() -> _Event:
            signalled(signal.SIGSTOP)
            return _later(fault.lasts_s, lambda: signalled(signal.SIGCONT))

        def fork() -> None:
            signalled(signal.SIGUSR2)

        def children() -> int:
            return len(list(self._folder.glob(f"child {fault.rank} *")))

        def kill_after_fork(before: int, tries: int = 400) -> _Event | None:
            if tries and children() == before:  # it may wait in a call of torch, and dies before it can fork
                return _later(0.005, lambda: kill_after_fork(before, tries - 1))
            kill()
            return None

        def fork_and_kill() -> _Event:
            before = children()
            fork()
            return _later(0.005, lambda: kill_after_fork(before))

        acts: dict[str, Callable[[], _Event | None]] = {
            "kill": kill,
            "stop": stop,
            "late": late,
            "fork": fork,
            "fork and kill": fork_and_kill,
            "no descriptors": lambda: self._starve(fault),
            "no memory": lambda: self._starve(fault),
        }
        return acts[fault.kind]

    def _starve(self, fault: Fault) -> _Event | None:
        """Leave a rank what it has, and nothing more; the event lifts the limit."""
        pid = self._members[fault.rank].pid
        kind = resource.RLIMIT_NOFILE if fault.kind == "no descriptors" else resource.RLIMIT_AS
        try:
            soft, hard = resource.prlimit(pid, kind)
            now = _lowest_free(pid) if kind == resource.RLIMIT_NOFILE else _address_space(pid)
            resource.prlimit(pid, kind, (now, hard))
        except (FileNotFoundError, ProcessLookupError):
            return None

        def lift() -> None:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, kind, (soft, hard))

        return _later(fault.lasts_s, lift)

    # ------------------------------------------------------------------ processes

    def _look(self, waiting: set[int], found: dict[int, Report]) -> None:
        """Take all reports that have come, and notice which processes have ended."""
        for rank, member in enumerate(self._members):
            with contextlib.suppress(EOFError, ConnectionResetError, OSError):
                while not member.pipe.closed and member.pipe.poll():
                    member.inbox.append(member.pipe.recv())
            if rank in waiting and member.inbox:
                found[rank] = member.inbox.pop(0)
                member.owed -= 1
                waiting.discard(rank)
        self._reap()
        waiting -= {rank for rank, member in enumerate(self._members) if member.status is not None and not member.inbox}

    def _reap(self) -> None:
        for member in self._members:
            if member.status is None:
                pid, status = os.waitpid(member.pid, os.WNOHANG)
                if pid:
                    member.status = status

    def _kill_all(self) -> None:
        for member in self._members:
            if member.status is None:
                os.kill(member.pid, signal.SIGKILL)
                member.status = os.waitpid(member.pid, 0)[1]

    def _stacks(self, ranks: Iterable[int]) -> str:
        """Let ranks print their stacks to stderr."""
        for rank in ranks:
            member = self._members[rank]
            if member.status is None:
                os.kill(member.pid, signal.SIGCONT)
                os.kill(member.pid, signal.SIGUSR1)
        time.sleep(0.3)
        return "; their stacks are in stderr"


def _later(seconds: float, act: Callable[[], _Event | None]) -> _Event:
    return _Event(time.monotonic() + seconds, act)


_OUTSIDE = ("kill", "stop", "late", "fork", "fork and kill", "no descriptors", "no memory")
"""Faults that the supervisor causes; the others a rank does to itself."""


def adopt_orphans() -> None:
    """Become the parent of all descendants whose parents end, so that none of them is overlooked. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _run_rank(pipe: Connection, folder: Path, number: int) -> None:
    """Be a rank; never returns."""
    try:
        if sys.platform == "linux":  # end with the supervisor, whatever ends it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        Rank(pipe, str(folder), number).serve()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _orphans() -> list[int]:
    """Return the processes whose parent is this one."""
    me, found = os.getpid(), []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == me:
                found.append(int(path.parent.name))
    return found


def _lowest_free(pid: int) -> int:
    """Return the number that the next descriptor of a process would have: as a limit, it leaves none."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    return next(number for number in range(len(used) + 1) if number not in used)


def _address_space(pid: int) -> int:
    """Return the bytes of address space that a process uses: as a limit, it leaves no new mapping."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
