"""A rank of a chaos soak: a process that does what its supervisor says, step by step, and reports what happened."""

from __future__ import annotations

import collections
import faulthandler
import os
import re
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.errors import ArgumentError, ClosedError, PeerTimeout, TokenferryError
from tokenferry.testing import chaos_shim
from tokenferry.testing.chaos_calls import Call, Decode, LargeRows, Replay, Rounds, Throughput, alternating
from tokenferry.testing.chaos_leftovers import descriptors, what_is_left
from tokenferry.testing.chaos_plan import STARVED, Fault, Round, Step
from tokenferry.testing.chaos_reports import CallReport, Close, ComeBack, Go, Join, Prepare, Report
from tokenferry.testing.soak_cases import shape_of
from tokenferry.testing.soak_graphs import KINDS, Graph
from tokenferry.types import MoeShape, Routing

JOIN_S = 60.0
"""Seconds that ranks may need to find each other by torch.distributed."""
CHILD_S = 60.0
"""Seconds that a forked child lives at most."""
_OUR_OWN = "failed between two calls, for lack of memory"
FED_S = 0.3
"""Seconds by which a limit may be lifted later than planned."""


@dataclass(slots=True, eq=False)
class _Open:
    """What is open: groups or, for DeepEP's API, a Buffer; and what there was before."""

    groups: list[ExpertGroup] = field(default_factory=list)
    buffer: chaos_shim.Buffer | None = None
    graph: Graph | None = None
    before: collections.Counter[str] = field(default_factory=collections.Counter)
    sockets: frozenset[str] = frozenset()

    def masked(self) -> frozenset[int]:
        if self.buffer is not None:
            return chaos_shim.masked_ranks(self.buffer)
        return frozenset().union(*(group.masked_ranks for group in self.groups))

    def close(self) -> None:
        self.graph = None
        for group in self.groups:
            group.close()
        if self.buffer is not None:
            self.buffer.destroy()


class _Left(Exception):  # noqa: N818 - no error, but what an application may do between two calls
    """Raised between two calls, as planned."""


class Rank:
    """The state of a rank process.

    Args:
        pipe: The connection to the supervisor.
        folder: Where forked children leave what they found.
        number: The number of this process in its episode.
    """

    def __init__(self, pipe: Connection, folder: str, number: int) -> None:
        self._pipe, self._folder, self._number = pipe, Path(folder), number
        self._supervisor = os.getppid()
        self._forks_due, self._forking = 0, False
        self._open = _Open()
        self._join: Join | None = None
        self._step: Step | None = None
        self._faults: tuple[Fault, ...] = ()
        self._rounds: list[Rounds] = []
        self._calls: list[Call] = []

    def serve(self) -> None:
        """Run commands until the supervisor closes the pipe."""
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        signal.signal(signal.SIGUSR2, self._fork_here)
        torch.set_num_threads(1)
        commands: dict[type, Callable[[Any], Report]] = {
            Join: self._do_join,
            Prepare: self._do_prepare,
            Go: self._do_go,
            ComeBack: self._do_come_back,
            Close: self._do_close,
        }
        while True:
            try:
                command = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                return
            try:
                report = commands[type(command)](command)
            except Exception:  # noqa: BLE001 - whatever it is, the supervisor has to know
                report = Report(wrong=f"{type(command).__name__} failed:\n{traceback.format_exc()}")
            self._pipe.send(report)

    # ------------------------------------------------------------------ commands

    def _do_join(self, join: Join) -> Report:
        self._join = join
        if join.episode.device == "cuda":
            torch.cuda.set_device(self._number % torch.cuda.device_count())
            torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call] # graphs need another one
            _use_gpu()  # a rank that starts its GPU is not late
        dist.init_process_group(
            "gloo",
            init_method=f"file://{join.store}",
            rank=join.rank,
            world_size=join.ranks,
            timeout=timedelta(seconds=JOIN_S),
        )
        return Report()

    def _do_prepare(self, prepare: Prepare) -> Report:
        self._step = step = prepare.step
        # Faults name processes, as they were numbered at first.
        self._faults = tuple(fault for fault in step.faults if fault.rank == self._number)
        if not step.rounds:
            self._open = _Open(before=descriptors())
            self._rounds, self._calls = [], [Call("making", self._make, lambda: frozenset())]
            return Report()
        self._rounds = [self._round(one, i) for i, one in enumerate(step.rounds)]
        self._calls = alternating(self._rounds, step.seed)
        return Report()

    def _do_go(self, _: Go) -> Report:
        start, reports, wrong, left, checks = time.monotonic(), list[CallReport](), "", False, 0
        try:
            for i, call in enumerate(self._calls):
                wrong = wrong or self._hurt_itself(i)
                reports.append(self._timed(call))
                if reports[-1].error:
                    break
            else:
                self._hurt_itself(len(self._calls))
        except (_Left, MemoryError):
            left = True
        starved = [fault for fault in self._faults if fault.kind in STARVED]
        for fault in starved:
            time.sleep(max(0.0, start + fault.delay_s + fault.lasts_s + FED_S - time.monotonic()))
        if starved and reports and reports[-1].error == _OUR_OWN:
            reports.pop()
            left = True
        failed = any(one.error for one in reports)
        wrong = wrong or (self._refuses() if failed and reports[-1].expected else "")
        if failed or (left and starved):
            self._open.close()  # as an application does
        masked = frozenset() if failed or left or self._nothing_open() else self._open.masked()
        try:
            cuda = _on_cuda()
            # On GPUs, an error says that some earlier call went wrong.
            checks = 0 if cuda and failed else sum(one.check() for one in self._rounds)
        except AssertionError as error:
            wrong = wrong or f"a wrong result: {error}"
        return Report(tuple(reports), checks, wrong, left, masked)

    def _do_come_back(self, _: ComeBack) -> Report:
        for group in self._open.groups:
            for rank in range(group.num_ranks):
                group.mask(rank, masked=False)
        return Report(masked=self._open.masked())

    def _do_close(self, _: Close) -> Report:
        start = time.monotonic()
        before, self._rounds, self._calls = self._open.before, [], []
        self._open.close()
        took_s = time.monotonic() - start
        self._open = _Open()
        wrong = what_is_left(before, cuda=_on_cuda())
        if _on_cuda():
            _use_gpu()
        if dist.is_initialized():
            dist.destroy_process_group()
        return Report((CallReport("close", took_s),), wrong=wrong)

    # ------------------------------------------------------------------ calls

    def _make(self) -> None:
        join = self._join
        assert join is not None
        episode, pg = join.episode, dist.group.WORLD
        assert pg is not None
        if episode.shim:
            self._open.buffer = chaos_shim.open_buffer(pg, shrink=episode.on_timeout == "mask")
        # Those that are left in the end may be too few for nodes.
        nodes = episode.ranks_per_node if join.ranks % (episode.ranks_per_node or 1) == 0 else None
        for _ in range(0 if episode.shim else episode.num_groups):
            self._open.groups.append(
                ExpertGroup(
                    pg,
                    shape_of(join.ranks),
                    backend=episode.device,
                    transport="auto" if nodes else episode.transport,
                    timeout_s=episode.timeout_s,
                    on_timeout=episode.on_timeout,
                    ranks_per_node=nodes,
                )
            )
            self._open.groups[-1].warmup()
        opened = descriptors() - self._open.before
        self._open.sockets = frozenset(name for name in opened if name.startswith("socket:"))
        if self._open.groups:
            self._open.graph = _graph(self._open.groups[0], episode.graph_seed)

    def _round(self, one: Round, number: int) -> Rounds:
        if self._open.buffer is not None:
            kind = chaos_shim.Shim if one.kind == "shim" else chaos_shim.ShimDecode
            return kind(self._open.buffer, one.seed)
        group = self._open.groups[number % len(self._open.groups)]
        if one.kind == "replay":
            assert self._open.graph is not None
            return Replay(self._open.groups[0], self._open.graph, one.seed)
        kinds: dict[str, Callable[[ExpertGroup, int], Rounds]] = {
            "throughput": Throughput,
            "decode": Decode,
            "large": LargeRows,
        }
        return kinds[one.kind](group, one.seed)

    def _timed(self, call: Call) -> CallReport:
        before, start = call.masks(), time.monotonic()
        try:
            call.run()
            for group in self._open.groups:
                group.synchronize()
        except _Left:
            raise
        except Exception as error:  # noqa: BLE001 - that it is one of ours is what is to be shown
            return _report(call.name, time.monotonic() - start, error, starved=bool(self._faults))
        took_s = time.monotonic() - start
        call.returned, call.masked = True, call.masks()
        call.disturbed = call.masked != before
        return CallReport(call.name, took_s)

    def _nothing_open(self) -> bool:
        return not self._open.groups and self._open.buffer is None

    def _refuses(self) -> str:
        """Return what is wrong if a broken group does anything but raise ClosedError."""
        broken = 0
        for group in self._open.groups:
            try:
                group.synchronize()
            except ClosedError:
                broken += 1
        making = not self._rounds
        return "" if broken or making or self._open.buffer is not None else "a call failed, and no group is broken"

    # ------------------------------------------------------------------ faults

    def _hurt_itself(self, i: int) -> str:
        """Do what is planned before call ``i``; return what is wrong."""
        for fault in self._faults:
            if i != min(fault.before_call, len(self._calls)) or not self._rounds:
                continue
            if fault.kind == "leave":
                raise _Left
            if fault.kind == "close":
                self._open.close()
                refused = self._refuses()
                if refused:
                    return refused
                raise _Left
            if fault.kind == "bad argument" and self._open.groups:
                return self._call_wrongly(i)
        return ""

    def _call_wrongly(self, i: int) -> str:
        group = self._open.groups[0]
        tall = torch.zeros(group.shape.max_tokens + 1, group.shape.hidden, dtype=torch.bfloat16, device="cpu")
        routing = Routing(torch.zeros(1, group.shape.top_k, dtype=torch.int64, device="cpu"))
        beyond = Routing(torch.full((1, group.shape.top_k), group.shape.num_experts, dtype=torch.int64, device="cpu"))
        wrong: Sequence[Callable[[], object]] = (
            lambda: group.dispatch(tall, routing),
            lambda: group.dispatch(tall[:1, :-8], routing),
            lambda: group.decode_dispatch(tall[:1], beyond),
            lambda: group.combine(tall[:1], None),  # type: ignore[arg-type]
            lambda: group.mask(group.rank),
        )
        try:
            wrong[i % len(wrong)]()
        except ArgumentError:
            return ""
        return f"wrong call {i % len(wrong)} was not refused"

    def _fork_here(self, *_: object) -> None:
        """Fork in the middle of whatever this process does; a handler of SIGUSR2."""
        self._forks_due += 1
        while self._forks_due and not self._forking:  # a process must not fork while it forks
            self._forking = True
            self._forks_due -= 1
            self._fork()
            self._forking = False

    def _fork(self) -> None:
        rank = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this process has threads is the point
            if os.fork():
                return
        try:
            note = self._folder / f"child {self._number} {os.getpid()}"
            draft = note.with_name(f"{note.name}.tmp")
            draft.touch()
            self._pipe.close()  # or the supervisor could not see that this rank has died
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            calls = any(fault.child_calls for fault in self._faults)
            found = self._as_a_child(calls=calls)
            draft.write_text(found)
            draft.rename(note)
            deadline = time.monotonic() + CHILD_S
            while time.monotonic() < deadline and os.getppid() in (rank, self._supervisor):
                time.sleep(0.05)
        finally:
            os._exit(0)

    def _some_calls(self) -> list[Callable[[], object]]:
        """Return a call of everything that is open."""
        x, idx = (
            torch.zeros(1, 128, dtype=torch.bfloat16, device="cpu"),
            torch.zeros(1, 1, dtype=torch.int64, device="cpu"),
        )
        calls: list[Callable[[], object]] = []
        for group in self._open.groups:
            view = partial(group.for_shape, MoeShape(group.num_ranks, 1, 128, 1))
            calls.append(partial(_dispatch, view, x, Routing(idx)))
        buffer = self._open.buffer
        if buffer is not None:
            calls.append(lambda: buffer.low_latency_dispatch(x, idx, 1, buffer.group_size, use_fp8=False))
        return calls

    def _as_a_child(self, *, calls: bool) -> str:
        """Return what is wrong with the groups that this child has inherited."""
        try:
            kept = sorted(self._open.sockets & descriptors().keys())
            if kept:
                return f"a forked child keeps {len(kept)} sockets of the group open"
            if not calls:
                return ""
            for call in self._some_calls():
                try:
                    call()
                except ClosedError:
                    continue
                return "a call in a forked child was made"
        except Exception:  # noqa: BLE001 - what a child finds is read by the supervisor
            return f"a call in a forked child failed:\n{traceback.format_exc()}"
        return ""


def _dispatch(view: Callable[[], ExpertGroup], x: Tensor, routing: Routing) -> object:
    return view().dispatch(x, routing)


def _on_cuda() -> bool:
    """Return whether this process uses a GPU."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _use_gpu() -> None:
    """Show that this process can use its GPU."""
    ones = torch.ones(1 << 20, dtype=torch.int32, device="cuda")
    assert ones.sum().item() == 1 << 20, "the GPU computes something else"


def _graph(group: ExpertGroup, seed: int) -> Graph:
    """Make the calls of a CUDA graph once and, on GPUs, the graph; collective."""
    graph = Graph(group, KINDS[seed % len(KINDS)])
    if group.backend != "cuda":
        return graph
    graph.call()
    group.synchronize()
    torch.cuda.synchronize()
    graph.capture(torch.cuda.current_stream())
    return graph


def _report(name: str, took_s: float, error: Exception, *, starved: bool) -> CallReport:
    trace = "".join(traceback.format_exception(error))
    kind = type(error).__name__
    if isinstance(error, PeerTimeout):
        return CallReport(name, took_s, kind, True, str(error), error.peers, error.call)
    if isinstance(error, TokenferryError):
        return CallReport(name, took_s, kind, True, str(error))
    package = os.path.dirname(os.path.dirname(__file__))
    places = re.findall(rf'File "{re.escape(package)}/(\w+)', trace)
    if places and places[-1] == "testing":
        if starved:
            return CallReport(name, took_s, _OUR_OWN)
        if isinstance(error, AssertionError):
            return CallReport(name, took_s, "a wrong result", False, str(error))
    return CallReport(name, took_s, f"{kind}, which is no TokenferryError", False, trace)
