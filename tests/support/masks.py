"""Jobs in which ranks are lost to decode calls, and come back. Threads on the emulator run them, too."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from support.decoding import Step, check_combined, check_received
from support.throughput import check_round_trip
from tokenferry import ArgumentError, DecodeDispatched, DispatchOptions, ExpertGroup, MoeShape, Routing, Scale
from tokenferry.testing.cases import Case

LOST = 2
"""The rank that is lost, of three."""
DEADLINE_S = 60.0
LATE_S = 0.2


class Notes:
    """Files by which ranks coordinate, whatever becomes of their group.

    Args:
        folder: Empty at first; the same for all ranks.
        rank: This rank.
        num_ranks: R.
    """

    def __init__(self, folder: str, rank: int, num_ranks: int) -> None:
        self._folder = Path(folder)
        self._rank = rank
        self.num_ranks = num_ranks

    def leave(self, what: str) -> None:
        """Leave a note."""
        (self._folder / f"{what} {self._rank}").touch()

    def are_left(self, what: str, ranks: Iterable[int]) -> bool:
        """Return whether all of these ranks have left it."""
        return all((self._folder / f"{what} {rank}").exists() for rank in ranks)

    def wait(self, what: str, ranks: Iterable[int] | None = None) -> None:
        """Wait until these ranks have left it, or all."""
        ranks = list(range(self.num_ranks) if ranks is None else ranks)
        deadline = time.monotonic() + DEADLINE_S
        while not self.are_left(what, ranks):
            assert time.monotonic() < deadline, f"{what!r} was not left by all of {ranks}"
            time.sleep(0.002)

    def barrier(self, what: str, ranks: Iterable[int] | None = None) -> None:
        """Wait until these ranks are here, or all."""
        self.leave(what)
        self.wait(what, ranks)

    def agree(self, what: str, ranks: Iterable[int], verdict: Callable[[], bool]) -> bool:
        """Return on each of these ranks the verdict of the first of them."""
        first = min(ranks)
        if self._rank == first:
            (self._folder / f"{what}: {verdict()} {first}").touch()
        deadline = time.monotonic() + DEADLINE_S
        while not self.are_left(f"{what}: True", [first]):
            if self.are_left(f"{what}: False", [first]):
                return False
            assert time.monotonic() < deadline, f"{what!r} was not decided by rank {first}"
            time.sleep(0.002)
        return True


class Iterations:
    """Pairs of decode calls, each with another routing; their results are compared with the oracle's.

    Args:
        group: The group that makes the calls.
        sizes: A case; four seeds of it take turns.
        lost: Ranks that are known to be lost, also to ranks that have not waited for them.
    """

    def __init__(self, group: ExpertGroup, sizes: Case, lost: frozenset[int] = frozenset()) -> None:
        self.group = group
        self._lost = lost
        self._relays = _relays(group)
        self.made = self.masked_during = 0
        self._cases = [Case(**{**vars(sizes), "seed": seed}) for seed in range(4)]
        self._known: dict[tuple[int, frozenset[int]], tuple[list[int], torch.Tensor]] = {}
        for number in range(len(self._cases)):  # before the first call: no rank shall be late for it
            self._expected(self._step(number), number)

    def one(self, *, hook: bool = False, between: Callable[[], None] | None = None) -> bool:
        """Dispatch and combine. Return False if a rank was lost meanwhile; the results are then not checked."""
        group, number = self.group, self.made % len(self._cases)
        self.made += 1
        away = group.masked_ranks
        step = self._step(number)
        sent = group.decode_dispatch(step.mine().x, step.routing(), return_hook=hook)
        sent.hook()
        if between is not None:
            between()
        # Experts that differ: a row that went astray, or is of another iteration, shows.
        experts = torch.arange(1.0, 1.0 + sent.x.shape[0], device=sent.x.device)[:, None, None]
        got = group.decode_combine(sent.x * experts, sent.plan, return_hook=hook)
        got.hook()
        group.synchronize()
        if group.masked_ranks != away:
            self.masked_during += 1
            return False
        self._compare(step, number, sent, got.x)
        return True

    def several(self, times: int) -> None:
        """Make so many iterations, none of which may lose a rank."""
        for i in range(times):
            assert self.one(hook=i % 3 == 1), f"iteration {self.made}: {sorted(self.group.masked_ranks)} were lost"

    def carefully(self) -> None:
        """Check every part of the results, with and without FP8, in both numerics."""
        step = self._step(1)
        for fp8 in (None, Scale.FLOAT32):
            sent = self.group.decode_dispatch(step.mine().x, step.routing(), quantize=fp8)
            check_received(step, sent, fp8)
            check_combined(self.group, step, sent, torch.float32)
            check_combined(self.group, step, sent, torch.bfloat16, fast=True, hook=True)

    def _step(self, number: int) -> Step:
        masked, case = self.group.masked_ranks, self._cases[number]
        return Step(case, self.group.rank, masked | self._lost, relays=self._relays, unaware=not masked)

    def _compare(self, step: Step, number: int, sent: DecodeDispatched, out: torch.Tensor) -> None:
        counts, sums = self._expected(step, number)
        assert sent.expert_counts.tolist() == counts, f"iteration {self.made} {step}: expert_counts"
        torch.testing.assert_close(
            out.cpu(), sums, rtol=1e-5, atol=1e-5, msg=lambda text: f"iteration {self.made}: {text}"
        )

    def _expected(self, step: Step, number: int) -> tuple[list[int], torch.Tensor]:
        key = number, step.away
        if key not in self._known:
            self._known[key] = expected(step)
        return self._known[key]


def _relays(group: ExpertGroup) -> tuple[tuple[int, ...], ...]:
    """Return the nodes through whose ranks rows go; none on one node."""
    return group.topology.nodes if group.backend == "cuda" and group.topology.num_nodes > 1 else ()


def expected(step: Step) -> tuple[list[int], torch.Tensor]:
    """Return the rows of each local expert, and the sums of own tokens if local expert e multiplies by e + 1."""
    oracle = step.oracle()
    mine, local = oracle.sent[step.rank], oracle.num_local
    factor = torch.where(mine.topk_idx >= 0, (mine.topk_idx % local + 1) * mine.topk_weights, 0.0).sum(1)
    return oracle.expert_counts(step.rank), mine.x.float() * factor[:, None]


def work_until(iterations: Iterations, notes: Notes, what: str, others: Iterable[int], ranks: Iterable[int]) -> None:
    """Make iterations until other ranks have left a note."""
    others, ranks = list(others), list(ranks)
    while not notes.agree(f"{what} at {iterations.made}", ranks, lambda: notes.are_left(what, others)):
        iterations.several(5)


def come_back(group: ExpertGroup, notes: Notes, ranks: Iterable[int], name: str = "back") -> None:
    """Resynchronise as `ExpertGroup.mask` says: the ranks that go on together mask all others."""
    ranks = list(ranks)
    for rank in set(range(notes.num_ranks)) - set(ranks):
        group.mask(rank)
    group.synchronize()
    notes.barrier(f"{name}: all is done", ranks)
    for rank in ranks:
        group.mask(rank, masked=False)
    notes.barrier(f"{name}: go on", ranks)


def all_together(group: ExpertGroup, iterations: Iterations, case: Case) -> None:
    """Check that no rank is masked and every call works."""
    iterations.made = 0  # the same routings everywhere
    assert group.masked_ranks == frozenset()
    iterations.several(12)
    iterations.carefully()
    check_round_trip(group, case, DispatchOptions())
    iterations.several(3)


CASE = Case((3, 2, 4), 6, 3, hidden=64, dtype=torch.float32)
TWO = Case((3, 4), 4, 3, hidden=64, dtype=torch.float32)


def warm_up(pg, pair, case: Case) -> None:
    """Make a few calls with a long deadline: the first ones of a process take longer than all others."""
    with pair.open(pg, case.shape) as group:
        Iterations(group, case).several(2)


def make_all_calls(rank: int, pg, pair, case: Case = CASE) -> None:
    """Make the calls of the jobs here with a long deadline."""
    with pair.open(pg, case.shape, on_timeout="mask") as group:
        all_together(group, Iterations(group, case), case)


@dataclass(frozen=True)
class Absence:
    """How `skip_and_return` loses a rank.

    Attributes:
        first_call: The first call of the others that misses it: "dispatch" or "combine".
        hook: Whether the others receive by hook.
    """

    first_call: str
    hook: bool = False


def skip_and_return(rank: int, pg, pair, folder: str, timeout_s: float, absence: Absence, case: Case = CASE) -> None:
    """The last rank calls only after the others have masked it, which is too late; then all resynchronise."""
    ranks, lost = case.ranks, case.ranks - 1
    notes = Notes(folder, rank, ranks)
    warm_up(pg, pair, case)
    with pair.open(pg, case.shape, timeout_s=timeout_s, on_timeout="mask") as group:
        group.warmup()
        iterations = Iterations(group, case)
        notes.barrier("begin")
        iterations.several(5)
        notes.barrier("ready")
        if rank == lost:
            be_away(group, iterations, notes, absence)
        else:
            start = time.monotonic()
            assert not iterations.one(hook=absence.hook), "no rank was lost"
            assert time.monotonic() - start < 2.5 * timeout_s + 1, "the lost rank was waited for again and again"
            assert group.masked_ranks == {lost}
            iterations.several(30)
            iterations.carefully()
            notes.leave("went on")
            work_until(iterations, notes, "is alone", [lost], range(lost))  # what it sends meanwhile is dropped
        come_back(group, notes, range(ranks))
        all_together(group, iterations, case)


def be_away(group: ExpertGroup, iterations: Iterations, notes: Notes, absence: Absence) -> None:
    others = frozenset(range(notes.num_ranks)) - {group.rank}
    if absence.first_call == "combine":
        iterations.one(between=lambda: notes.wait("went on", others))
    else:
        notes.wait("went on", others)
    while group.masked_ranks != others:
        iterations.one()
    iterations.several(3)
    notes.leave("is alone")


@dataclass(frozen=True)
class Load:
    """Settings of `under_load`.

    Attributes:
        lost: Ranks that are lost; they come back one after the other.
        least: Iterations that the others make at least without them.
        stopped: Whether the test stops their processes; else they wait by themselves.
    """

    lost: tuple[int, ...]
    least: int
    stopped: bool


def under_load(rank: int, pg, pair, folder: str, timeout_s: float, load: Load) -> dict[str, int]:
    """Make iterations without a pause; some ranks are lost on the way and come back.

    Returns:
        dict: how many iterations were made, and in how many of them a rank was lost.
    """
    notes, lost = Notes(folder, rank, pg.size()), load.lost
    case = Case((3, 2, 4, 1)[: pg.size()], 2 * pg.size(), 3, hidden=64, dtype=torch.float32)
    others = frozenset(range(pg.size())) - set(lost)
    warm_up(pg, pair, case)
    with pair.open(pg, case.shape, timeout_s=timeout_s, on_timeout="mask") as group:
        group.warmup()
        iterations = Iterations(group, case)
        notes.barrier("begin")
        iterations.several(5)
        notes.barrier("ready")
        made = 0
        if rank in lost:
            if not load.stopped:
                notes.wait("went on", others)
            while not group.masked_ranks >= others:  # stopped somewhere in here
                iterations.one()
            notes.leave("is alone")
        else:
            # A rank that is stopped between two of its messages is missed by some in one call, by others in the next,
            # which may be of another iteration.
            while not notes.agree(f"known at {iterations.made}", others, lambda: notes.are_left("knows", others)):
                for _ in range(5):
                    iterations.one(hook=iterations.made % 2 == 1)
                if group.masked_ranks >= set(lost):
                    notes.leave("knows")
            iterations.made = 0
            iterations.several(load.least)
            iterations.carefully()
            notes.leave("went on")
            work_until(iterations, notes, "is alone", lost, others)
            made, iterations.made = iterations.made, 0
        for i, back in enumerate(lost):
            if rank in others or rank in lost[: i + 1]:
                here = others | set(lost[: i + 1])
                come_back(group, notes, here, f"back {back}")
                iterations.made = 0
                iterations.several(7)
                iterations.carefully()
        all_together(group, iterations, case)
    return {"made": made, "masked": iterations.masked_during}


def by_hand(rank: int, pg, pair, folder: str, both_sides: bool, timeout_s: float) -> None:
    """Ranks 0 and 1 mask rank 2, which masks them or not; they make different numbers of calls, and leave some open."""
    notes, others = Notes(folder, rank, 3), frozenset(range(3)) - {rank}
    away = frozenset({LOST}) if rank != LOST else others
    warm_up(pg, pair, CASE)
    with pair.open(pg, CASE.shape, timeout_s=timeout_s, on_timeout="raise" if both_sides else "mask") as group:
        group.warmup()
        iterations = Iterations(group, CASE)
        notes.barrier("begin")
        iterations.several(3)
        for turn in range(2):
            if rank != LOST or both_sides:
                for other in away:
                    group.mask(other)
            else:
                while group.masked_ranks != away:
                    assert not iterations.one(), "a rank that masked this one sent to it"
            iterations.made = 0
            iterations.several(9 if (rank == LOST) == (turn == 1) else 4)
            step = Step(replace(CASE, seed=9), rank, away)  # rows that no iteration has
            x, routing = step.mine().x, step.routing()
            sent = group.decode_dispatch(x, routing)
            left = [
                group.decode_combine(sent.x, sent.plan, return_hook=True),
                group.decode_dispatch(x, routing, return_hook=True),
            ]
            come_back(group, notes, range(3), f"turn {turn}")
            for one in left:
                one.hook()
            iterations.made = 0
            for _ in range(2):  # in each half of a workspace; until rank 1 comes, what was left there could be its rows
                assert iterations.one(between=lambda: time.sleep(LATE_S if rank == 1 else 0.0))
            all_together(group, iterations, CASE)
            for one in left:
                one.hook()


def masked_meanwhile(rank: int, pg, pair) -> None:
    """Ranks 0 and 1 and rank 2 mask each other by hand, and unmask, while hooks of both kinds are pending."""
    away = frozenset({LOST}) if rank != LOST else frozenset(range(3)) - {rank}
    step = Step(CASE, rank, away, unaware=True)
    with pair.open(pg, CASE.shape, timeout_s=30.0) as group:
        x, routing = step.mine().x, step.routing()
        sent = group.decode_dispatch(x, routing)
        factors = torch.arange(1.0, 1.0 + sent.x.shape[0], device=sent.x.device)[:, None, None]
        home = group.decode_combine(sent.x * factors, sent.plan, return_hook=True)
        late = group.decode_dispatch(x, routing, return_hook=True)
        for masked in (True, False):
            for other in away:
                group.mask(other, masked=masked)
        home.hook()
        late.hook()
        counts, sums = expected(step)
        assert late.expert_counts.tolist() == counts
        torch.testing.assert_close(home.x, sums, rtol=1e-5, atol=1e-5)
        Iterations(group, CASE).several(3)


def other_calls_under_masks(rank: int, pg, pair) -> None:
    """Rank 0 and the others mask each other by hand; a dispatch and its combine include all of them."""
    ranks = range(pg.size())
    with pair.open(pg, MoeShape(len(ranks), len(ranks), 16, 1), timeout_s=30.0) as group:
        for other in [0] if rank else ranks[1:]:
            group.mask(other)
        x = torch.full((1, 16), 1.0 + rank, device=group.device)
        for counts in ("host", "device"):
            routing = Routing(torch.tensor([list(ranks)], dtype=torch.int64, device=group.device))
            sent = group.dispatch(x, routing, options=DispatchOptions(counts=counts))
            assert sent.plan.src_counts.tolist() == [1] * len(ranks)
            assert sent.x[: len(ranks), 0].tolist() == [1.0 + source for source in ranks]
            again = group.redispatch(x, sent.plan)
            assert torch.equal(again.x[: len(ranks)], sent.x[: len(ranks)])
            assert torch.equal(group.combine(again.x, sent.plan).x, len(ranks) * x)


def sent_to_one(rank: int, pg, pair, folder: str, timeout_s: float) -> None:
    """The lost rank has sent its rows to rank 0 alone; so rank 1 waits for it while rank 0 waits for rank 1."""
    notes = Notes(folder, rank, 3)
    warm_up(pg, pair, CASE)
    with pair.open(pg, CASE.shape, timeout_s=timeout_s, on_timeout="mask") as group:
        iterations = Iterations(group, CASE)
        notes.barrier("begin")
        iterations.several(3)
        notes.barrier("ready")
        step = Step(CASE, rank)
        transport = group._backend._exchange.transport
        if rank == LOST:
            post = transport.post
            transport.post = lambda call, headers, deadline, skip: post(call, headers, deadline, skip | {1})
        sent = group.decode_dispatch(step.mine().x, step.routing(), return_hook=True)
        if rank != LOST:
            time.sleep(timeout_s / 4 if rank == 1 else 0.0)  # rank 0 comes first to the end of its timeout
            sent.hook()
            group.decode_combine(sent.x, sent.plan)
            assert group.masked_ranks == {LOST}
            iterations.made = 0
            iterations.several(9)
            notes.leave("went on")
        notes.wait("went on", (0, 1))


class Graph:
    """A CUDA graph of a pair of decode calls.

    Args:
        group: Makes them.
        case: What they send.
        within: Called in the capture.
    """

    def __init__(self, group: ExpertGroup, case: Case, within: Callable[[], None] = lambda: None) -> None:
        self._case, self._rank = case, group.rank
        self._relays = _relays(group)
        mine = Step(case, group.rank).mine()
        x = mine.x.to(group.device)
        routing = Routing(mine.topk_idx.to(group.device), mine.topk_weights.to(group.device))
        experts = torch.arange(1.0, 3.0, device=group.device, dtype=torch.float32)[:, None, None]

        def once() -> tuple[torch.Tensor, torch.Tensor]:
            sent = group.decode_dispatch(x, routing)
            return sent.expert_counts, group.decode_combine(sent.x * experts, sent.plan).x

        once()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._counts, self._out = once()
            within()

    def replay(self, times: int) -> None:
        """Replay it so often, and wait for that."""
        for _ in range(times):
            self._graph.replay()
        torch.cuda.synchronize()

    def check(self, masked: frozenset[int]) -> None:
        """Compare the results of the last replay with the oracle's, without these ranks."""
        counts, sums = expected(Step(self._case, self._rank, masked, relays=self._relays))
        assert self._counts.tolist() == counts
        torch.testing.assert_close(self._out.cpu(), sums, rtol=1e-5, atol=1e-5)


def in_a_graph(rank: int, pg, pair, folder: str) -> None:
    """Replay a CUDA graph under masks that come and go after its capture."""
    notes, away = Notes(folder, rank, 3), frozenset({LOST}) if rank != LOST else frozenset({0, 1})
    with pair.open(pg, CASE.shape, timeout_s=30.0) as group:
        group.warmup()

        def refused() -> None:
            with pytest.raises(ArgumentError, match="mask: not while a CUDA graph is captured"):
                group.mask(min(away))

        graph = Graph(group, CASE, refused)
        for turn, masked in enumerate((frozenset(), away, frozenset(), away, frozenset())):
            torch.cuda.synchronize()
            if masked:
                for other in masked:
                    group.mask(other)
            else:
                come_back(group, notes, range(3), f"turn {turn}")
            graph.replay(20 if rank != LOST or not masked else 13)
            graph.check(masked)


def lost_in_replays(rank: int, pg, pair, folder: str, timeout_s: float, case: Case) -> None:
    """The last rank does not replay for a while: the others' graph goes on without it, until it comes back."""
    ranks, lost = case.ranks, case.ranks - 1
    notes, nobody, others = Notes(folder, rank, ranks), frozenset(), frozenset(range(lost))
    warm_up(pg, pair, case)
    with pair.open(pg, case.shape, timeout_s=timeout_s, on_timeout="mask") as group:
        group.warmup()
        notes.barrier("begin")
        graph = Graph(group, case)
        graph.replay(5)
        graph.check(nobody)
        notes.barrier("ready")
        if rank == lost:
            notes.wait("went on", others)
            graph.replay(3)  # late: they have gone on
            assert group.masked_ranks == others
        else:
            graph.replay(1)
            assert group.masked_ranks == {lost}
            graph.replay(30)
            graph.check(frozenset({lost}))
            notes.leave("went on")
        come_back(group, notes, range(ranks))
        graph.replay(7)
        graph.check(nobody)
        all_together(group, Iterations(group, case), case)
