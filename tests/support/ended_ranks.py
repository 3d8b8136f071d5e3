"""Jobs in which the process of rank 2 ends, or closes its group, and the deadline is too far away to help.

On the emulator ranks are threads: there the others are told what the watch of processes would note.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from support.decoding import Step, check_received
from support.lost_ranks import CASE, LOST_RANK, Report, calls, check_report, complete, expect_timeout, report_of
from support.masks import Absence, Iterations, Notes, expected, warm_up
from tokenferry import DispatchOptions, ExpertGroup, Layout, PeerTimeout, Routing
from tokenferry.testing.cases import Case

DEADLINE_S = 100.0
SOON_S = 30.0
"""A busy machine may notice the end of a process this late; on an idle one it takes a fraction of a second."""
LATE_S = 0.3
"""Longer than the waits in which kernels do not look for ended processes (kLongWait)."""

End = Callable[[ExpertGroup], None]
"""What makes rank 2 end, on rank 2; or what the other ranks are told, on those."""


def note_end(group: ExpertGroup) -> None:
    """Tell this rank that the process of rank 2 has ended, as its watch of processes would."""
    group._backend.context.pinned.ended[0] |= 1 << LOST_RANK


def nothing(_: ExpertGroup) -> None:
    """Let other processes notice by themselves."""


@dataclass(frozen=True)
class Ending:
    """How rank 2 ends.

    Attributes:
        folder: Where ranks leave notes for each other; empty at first.
        end: Called on rank 2 when it is to end.
        tell: Called on the other ranks at that time.
    """

    folder: str
    end: End = nothing
    tell: End = nothing


def end_in(rank: int, pg, pair, ending: Ending, phase: str) -> Report | None:
    """Rank 2 ends before a call; the others must report that, far ahead of the deadline."""
    notes = Notes(ending.folder, rank, 3)
    name, _, layout = phase.partition(" of ")
    with pair.open(pg, CASE.shape, timeout_s=DEADLINE_S) as group:
        todo = calls(group, rank, DispatchOptions(Layout[layout]) if layout else None)
        notes.barrier("ready")
        if rank == LOST_RANK:
            ending.end(group)
            notes.wait("has reported", (0, 1))
            return None
        ending.tell(group)
        report = expect_timeout(todo, name, group)
        notes.leave("has reported")
        return report


def check_ended(report: Report, rank: int, phase: str, why: str = "its process ended") -> None:
    check_report(report, rank, phase.partition(" of ")[0])
    assert report.peers == (LOST_RANK,)
    assert why in report.text, report.text
    assert report.waited_s < SOON_S
    assert report.took_s < SOON_S


class EndedError(Exception):
    """Rank 2 leaves a call in the middle."""


def leave() -> None:
    raise EndedError


def go_on_after_an_end(rank: int, pg, pair, ending: Ending, absence: Absence) -> None:
    """Rank 2 ends in the middle of decoding: the others mask it at once and go on, but for throughput calls."""
    notes = Notes(ending.folder, rank, 3)
    warm_up(pg, pair, CASE)
    with pair.open(pg, CASE.shape, timeout_s=DEADLINE_S, on_timeout="mask") as group:
        group.warmup()
        iterations = Iterations(group, CASE)
        notes.barrier("begin")
        iterations.several(3)
        notes.barrier("ready")
        if rank == LOST_RANK:
            if absence.first_call == "combine":
                with pytest.raises(EndedError):
                    iterations.one(between=leave)
            ending.end(group)
            notes.wait("went on", (0, 1))
            return
        start = time.monotonic()
        if absence.first_call == "dispatch":
            ending.tell(group)
        assert not iterations.one(hook=absence.hook, between=lambda: ending.tell(group)), "no rank was lost"
        assert group.masked_ranks == {LOST_RANK}
        iterations.several(6)
        iterations.carefully()
        step = Step(CASE, rank)
        with pytest.raises(PeerTimeout, match=r"rank 2: (its process ended|it closed the group)"):
            complete(group, lambda: group.dispatch(step.mine().x, step.routing()))
        assert time.monotonic() - start < DEADLINE_S
        notes.leave("went on")


def receive_from_a_rank_that_has_ended(rank: int, pg, pair, folder: str, on_timeout: str) -> None:
    """What rank 2 has sent is received, although another rank is late and rank 2 is known to have ended."""
    notes, case = Notes(folder, rank, 3), Case((3, 2, 4), 6, 3, hidden=64)
    step = Step(case, rank)
    x, routing = step.mine().x, step.routing()
    with pair.open(pg, case.shape, timeout_s=DEADLINE_S, on_timeout=on_timeout) as group:
        check_received(step, group.decode_dispatch(x, routing), None)
        notes.barrier("ready")
        if rank == LOST_RANK:
            group.decode_dispatch(x, routing, return_hook=True)  # sends, and receives nothing
            notes.leave("has sent")
            notes.wait("done", (0, 1))
            return
        notes.wait("has sent", (LOST_RANK,))
        note_end(group)
        if rank == 1:
            time.sleep(LATE_S)
        sent = group.decode_dispatch(x, routing)
        group.synchronize()
        check_received(step, sent, None)
        assert group.masked_ranks == frozenset()
        if on_timeout == "mask":
            group.decode_combine(torch.ones_like(sent.x), sent.plan)
            group.synchronize()
            assert group.masked_ranks == {LOST_RANK}
        else:
            with pytest.raises(PeerTimeout, match="rank 2: its process ended"):
                complete(group, lambda: group.decode_combine(torch.ones_like(sent.x), sent.plan))
        notes.leave("done")


# ---------------------------------------------------------------------- processes that are killed


def be_killed(_: ExpertGroup) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_survived_by_a_child(_: ExpertGroup) -> None:
    """Fork a child that holds what the driver has opened, as a worker of a DataLoader would, and be killed."""
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    for name in os.listdir("/proc/self/fd"):  # the world takes the end of a pipe for that of a rank
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("/dev/nvidia"):
                os.close(int(name))
    time.sleep(SOON_S)
    os._exit(0)


def decode_until_killed(rank: int, pg, pair, folder: str) -> int:
    """Rank 2 is killed wherever it is; the others go on. Return how many iterations lost it."""
    notes, others = Notes(folder, rank, 3), (0, 1)
    warm_up(pg, pair, CASE)
    with pair.open(pg, CASE.shape, timeout_s=DEADLINE_S, on_timeout="mask") as group:
        group.warmup()
        iterations = Iterations(group, CASE)
        notes.barrier("begin")
        iterations.several(5)
        notes.leave("ready")
        while rank == LOST_RANK:
            iterations.one()
        while not notes.agree(f"lost at {iterations.made}", others, lambda: bool(group.masked_ranks)):
            for i in range(5):
                iterations.one(hook=i % 2 == 1)
        for i in range(5):  # the other one may notice it an iteration later
            iterations.one(hook=i % 2 == 1)
        assert group.masked_ranks == {LOST_RANK}
        iterations.several(20)
        iterations.carefully()
        return iterations.masked_during


def end_in_a_decode_graph(rank: int, pg, pair, ending: Ending) -> None:
    """Replays of a CUDA graph go on without rank 2."""
    notes = Notes(ending.folder, rank, 3)
    with pair.open(pg, CASE.shape, timeout_s=DEADLINE_S, on_timeout="mask") as group:
        group.warmup()
        step = Step(CASE, rank)
        x = step.mine().x.to(group.device)
        routing = Routing(step.mine().topk_idx.to(group.device), step.mine().topk_weights.to(group.device))
        experts = torch.arange(1.0, 3.0, device=group.device)[:, None, None]

        def once() -> tuple[torch.Tensor, torch.Tensor]:
            sent = group.decode_dispatch(x, routing)
            return sent.expert_counts, group.decode_combine(sent.x * experts, sent.plan).x

        once()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            counts, out = once()

        def replay(away: frozenset[int]) -> None:
            want_counts, want_sums = expected(Step(CASE, rank, away))
            for _ in range(20):
                graph.replay()
            torch.cuda.synchronize()
            assert group.masked_ranks == away
            assert counts.tolist() == want_counts
            torch.testing.assert_close(out.cpu(), want_sums, rtol=1e-5, atol=1e-5)

        replay(frozenset())
        notes.barrier("replayed")
        if rank == LOST_RANK:
            ending.end(group)
        start = time.monotonic()
        replay(frozenset({LOST_RANK}))
        assert time.monotonic() - start < SOON_S


def end_in_a_throughput_graph(rank: int, pg, pair, ending: Ending) -> Report | None:
    """A replay of a CUDA graph ends without rank 2, and the next call reports it."""
    notes = Notes(ending.folder, rank, 3)
    with pair.open(pg, CASE.shape, timeout_s=DEADLINE_S) as group:
        group.warmup()
        mine = CASE.inputs()[rank]
        x = mine.x.to(group.device)
        routing = Routing(mine.topk_idx.to(group.device), mine.topk_weights.to(group.device))

        def once() -> None:
            sent = group.dispatch(x, routing, options=DispatchOptions(counts="device"))
            group.combine(sent.x, sent.plan)

        once()
        group.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
        group.synchronize()
        notes.barrier("replayed")
        if rank == LOST_RANK:
            ending.end(group)
        start = time.monotonic()
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
        with pytest.raises(PeerTimeout) as caught:
            group.synchronize()
        return report_of(caught.value, time.monotonic() - start)
