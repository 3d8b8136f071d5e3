"""Jobs in which rank 2 of three dies, is late or does not call, and what the other two must report.

Threads on the emulator run some of them, too.
"""

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from support.decoding import Step, check_combined, check_received
from support.pairs import Pair
from support.throughput import all_options, check_round_trip
from tokenferry import ClosedError, DispatchOptions, ExpertGroup, PeerTimeout, Routing, TokenferryError
from tokenferry.testing.cases import Case

LOST_RANK = 2
CASE = Case((3, 2, 4), 6, 2, hidden=64, dtype=torch.float32)
PHASES = (
    *("dispatch", "redispatch", "combine", "decode_dispatch", "decode_combine"),
    *("decode_dispatch by hook", "decode_combine by hook"),
)
LONG_S = 30.0
"""More than any rank of a busy machine is late; a rank that died must be noticed much earlier."""
SHORT_S = 4.0
"""Jobs with this deadline start with a barrier, so that slow imports on a busy machine are not taken for a fault."""
CROWDED_S = 5.0
"""The same for jobs on several worlds at the same time, whose ranks share the processors."""
SLACK_S = 10.0
"""A busy machine may notice this much later that a deadline has passed."""


@dataclass
class Report:
    """The PeerTimeout that a rank caught.

    Attributes:
        phase: The call that timed out.
        call: Call number.
        rank: The rank that waited.
        peers: The ranks that it waited for.
        waited_s: Seconds waited, as the error states them.
        took_s: Seconds from the call to the error, as the test measured them.
        text: The message.
    """

    phase: str
    call: int
    rank: int
    peers: tuple[int, ...]
    waited_s: float
    took_s: float
    text: str


def report_of(error: PeerTimeout, took_s: float = 0.0) -> Report:
    return Report(error.phase, error.call, error.rank, error.peers, error.waited_s, took_s, str(error))


@dataclass(frozen=True)
class Loss:
    """How rank 2 is lost.

    Attributes:
        phase: The call that it misses.
        folder: Where ranks leave notes for each other; empty at first.
        timeout_s: The deadline of the group.
        never_calls: Whether it does not make the call later, either.
        is_stopped: Whether its process is stopped meanwhile, as under a debugger: sockets stay open, nothing is sent.
    """

    phase: str
    folder: str
    timeout_s: float = SHORT_S
    never_calls: bool = False
    is_stopped: bool = False


# ---------------------------------------------------------------------- the ranks wait for each other


def barrier(pg) -> None:
    pg.barrier().wait()


def leave_note(folder: str, rank: int, note: str) -> None:
    """Make a file that `wait_for_others` finds, whatever becomes of the group."""
    Path(folder, f"{rank} {note}").touch()


def wait_for_others(folder: str, note: str = "has reported") -> None:
    """Wait until two ranks have left the note."""
    while len(list(Path(folder).glob(f"* {note}"))) < 2:
        time.sleep(0.01)


# ---------------------------------------------------------------------- calls


def calls(group: ExpertGroup, rank: int, options: DispatchOptions | None = None) -> dict[str, Callable[[], Any]]:
    """Return a function for each phase; all that it needs has been made and received."""
    group.warmup()  # a rank that compiles is not late
    mine = CASE.inputs()[rank]
    routing = Routing(mine.topk_idx, mine.topk_weights)
    sent = group.dispatch(mine.x, routing, options=options)
    decoded = group.decode_dispatch(mine.x, routing)
    group.synchronize()

    def dispatch_by_hook() -> None:
        group.decode_dispatch(mine.x, routing, return_hook=True).hook()

    def combine_by_hook() -> None:
        group.decode_combine(decoded.x, decoded.plan, return_hook=True).hook()

    return {
        "dispatch": lambda: group.dispatch(mine.x, routing, options=options),
        "redispatch": lambda: group.redispatch(mine.x, sent.plan),
        "combine": lambda: group.combine(sent.x, sent.plan),
        "decode_dispatch": lambda: group.decode_dispatch(mine.x, routing),
        "decode_combine": lambda: group.decode_combine(decoded.x, decoded.plan),
        "decode_dispatch by hook": dispatch_by_hook,
        "decode_combine by hook": combine_by_hook,
    }


def complete(group: ExpertGroup, call: Callable[[], Any]) -> None:
    """Make a call and wait until the device has finished it."""
    call()
    group.synchronize()


def complete_twice(group: ExpertGroup, call: Callable[[], Any]) -> None:
    complete(group, call)
    complete(group, call)


def expect_timeout(todo: dict[str, Callable[[], Any]], phase: str, group: ExpertGroup) -> Report:
    """Make the call of a phase, which must time out and leave a group that raises ClosedError."""
    start = time.monotonic()
    with pytest.raises(PeerTimeout) as caught:
        complete(group, todo[phase])
    error, took_s = caught.value, time.monotonic() - start
    assert group.backend == "cpu" or re.search(r"epoch \d+ seen.* \d+ expected", str(error)), str(error)
    for call in todo.values():
        with pytest.raises(ClosedError, match="PeerTimeout"):
            call()
    group.close()
    group.close()
    return report_of(error, took_s)


# ---------------------------------------------------------------------- jobs


def sleep_in(rank, pg, pair: Pair, loss: Loss) -> Report | None:
    """Rank 2 makes its call only after the others have given it up."""
    barrier(pg)
    with pair.open(pg, CASE.shape, timeout_s=loss.timeout_s) as group:
        return lose(group, rank, loss)


def lose(group: ExpertGroup, rank: int, loss: Loss) -> Report | None:
    todo = calls(group, rank)
    if rank != LOST_RANK:
        report = expect_timeout(todo, loss.phase, group)
        leave_note(loss.folder, rank, "has reported")
        if loss.is_stopped and rank == 0:
            let_go_on(loss.folder)
        return report
    if loss.is_stopped:
        leave_note(loss.folder, os.getpid(), "is stopped")
        os.kill(os.getpid(), signal.SIGSTOP)
        leave_note(loss.folder, rank, "goes on")
    wait_for_others(loss.folder)
    if not loss.never_calls:
        with pytest.raises(TokenferryError):
            complete_twice(group, todo[loss.phase])  # what was sent before may still be here, but no more
    return None


def let_go_on(folder: str) -> None:
    """Let the process that is stopped go on once two ranks have reported; on a busy machine it may yet have to stop."""
    wait_for_others(folder)
    while not Path(folder, f"{LOST_RANK} goes on").exists():
        for note in Path(folder).glob("* is stopped"):
            os.kill(int(note.name.split()[0]), signal.SIGCONT)
        time.sleep(0.01)


def lose_and_go_on(rank, pg, pair: Pair, loss: Loss) -> Report | None:
    """Rank 2 is lost; then all three make a new group in the same processes and work on."""
    report = sleep_in(rank, pg, pair, loss)
    barrier(pg)
    work(pg, pair, CASE)
    return report


def work(pg, pair: Pair, case: Case) -> None:
    """Open a group and make calls of every kind."""
    with pair.open(pg, case.shape) as group:
        for options in all_options(case)[::3]:
            check_round_trip(group, case, options)
        step = Step(case, group.rank)
        sent = group.decode_dispatch(step.mine().x, step.routing())
        check_received(step, sent, None)
        check_combined(group, step, sent, torch.bfloat16)


# ---------------------------------------------------------------------- reports


def check_report(report: Report, rank: int, phase: str) -> None:
    name = phase.split()[0]
    assert report.phase == name
    assert report.call == 3, "the first two calls prepared it"
    assert report.rank == rank
    # A rank that notices first closes its group; one that still waits may notice that before it notices rank 2.
    assert LOST_RANK in report.peers or "closed" in report.text
    assert f"{name} #3: rank {rank} waited" in report.text
    assert "tokenferry explain-error PeerTimeout" in report.text


def check_late(report: Report, rank: int, phase: str, timeout_s: float = SHORT_S) -> None:
    check_report(report, rank, phase)
    assert report.peers == (LOST_RANK,)
    # A GPU that gives up notifies its peers, which need not wait for their own deadlines.
    notified = f"rank {1 - rank} gave it up" in report.text
    assert 0 <= report.waited_s < timeout_s + SLACK_S
    assert notified or report.waited_s >= timeout_s
    assert report.took_s < timeout_s + SLACK_S


def check_both_late(reports: list[Report], phase: str, timeout_s: float = SHORT_S) -> None:
    for rank in (0, 1):
        check_late(reports[rank], rank, phase, timeout_s)
    assert max(reports[0].waited_s, reports[1].waited_s) >= timeout_s
