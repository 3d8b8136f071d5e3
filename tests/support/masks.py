"""Jobs in which ranks are lost to decode calls, and come back. Threads on the emulator run them, too."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from support.decoding import Step, check_combined, check_received
from support.throughput import check_round_trip
from tokenferry import ArgumentError, DecodeDispatched, DispatchOptions, ExpertGroup, Routing, Scale
from tokenferry.testing.cases import Case

LOST = 2
"""The rank that is lost, of three."""
DEADLINE_S = 60.0
LATE_S = 0.2


class Party:
    """Ranks that meet in a folder, whatever becomes of their group.

    Args:
        folder: Empty at first; the same for all.
        rank: This one's.
        num_ranks: R.
    """

    def __init__(self, folder: str, rank: int, num_ranks: int) -> None:
        self._folder = Path(folder)
        self._rank = rank
        self.num_ranks = num_ranks

    def say(self, what: str) -> None:
        """Leave a word."""
        (self._folder / f"{what} {self._rank}").touch()

    def said(self, what: str, ranks: Iterable[int]) -> bool:
        """Whether all of these have left it."""
        return all((self._folder / f"{what} {rank}").exists() for rank in ranks)

    def wait(self, what: str, ranks: Iterable[int] | None = None) -> None:
        """Wait until these have, or all."""
        ranks = list(range(self.num_ranks) if ranks is None else ranks)
        deadline = time.monotonic() + DEADLINE_S
        while not self.said(what, ranks):
            assert time.monotonic() < deadline, f"{what!r} was not said by all of {ranks}"
            time.sleep(0.002)

    def meet(self, what: str, ranks: Iterable[int] | None = None) -> None:
        """A barrier of these, or of all."""
        self.say(what)
        self.wait(what, ranks)

    def agree(self, what: str, ranks: Iterable[int], verdict: Callable[[], bool]) -> bool:
        """What the first of these ranks finds; each asks."""
        first = min(ranks)
        if self._rank == first:
            (self._folder / f"{what}: {verdict()} {first}").touch()
        deadline = time.monotonic() + DEADLINE_S
        while not self.said(f"{what}: True", [first]):
            if self.said(f"{what}: False", [first]):
                return False
            assert time.monotonic() < deadline, f"{what!r} was not decided by rank {first}"
            time.sleep(0.002)
        return True


class Rounds:
    """Rounds of decode calls, each with another routing; results are compared with the oracle's, computed once.

    Args:
        group: Whose calls.
        sizes: A case; its seeds are tried in turn.
        party: For its number of ranks.
    """

    def __init__(self, group: ExpertGroup, sizes: Case) -> None:
        self.group = group
        self.made = self.masked_during = 0
        self._cases = [Case(**{**vars(sizes), "seed": seed}) for seed in range(4)]
        self._known: dict[tuple[int, frozenset[int]], tuple[list[int], torch.Tensor]] = {}

    def one(self, *, hook: bool = False, between: Callable[[], None] | None = None) -> bool:
        """Dispatch and combine. False: a rank was lost meanwhile, and the results are not looked at."""
        group, number = self.group, self.made % len(self._cases)
        self.made += 1
        away = group.masked_ranks
        step = Step(self._cases[number], group.rank, away)
        sent = group.decode_dispatch(step.mine().x, step.routing(), return_hook=hook)
        sent.hook()
        if between is not None:
            between()
        # Experts that differ: a row that went astray, or is of another round, shows.
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
        """So many, none of which may lose a rank."""
        for i in range(times):
            assert self.one(hook=i % 3 == 1), f"round {self.made}: {sorted(self.group.masked_ranks)} were lost"

    def carefully(self) -> None:
        """All that a result consists of, with and without FP8, in both numerics."""
        step = Step(self._cases[1], self.group.rank, self.group.masked_ranks)
        for fp8 in (None, Scale.FLOAT32):
            sent = self.group.decode_dispatch(step.mine().x, step.routing(), quantize=fp8)
            check_received(step, sent, fp8)
            check_combined(self.group, step, sent, torch.float32)
            check_combined(self.group, step, sent, torch.bfloat16, fast=True, hook=True)

    def _compare(self, step: Step, number: int, sent: DecodeDispatched, out: torch.Tensor) -> None:
        key = number, step.away
        if key not in self._known:
            self._known[key] = expected(step)
        counts, sums = self._known[key]
        assert sent.expert_counts.tolist() == counts, f"round {self.made} {step}: expert_counts"
        torch.testing.assert_close(out.cpu(), sums, rtol=1e-5, atol=1e-5, msg=lambda told: f"round {self.made}: {told}")


def expected(step: Step) -> tuple[list[int], torch.Tensor]:
    """Rows of each local expert, and sums of own tokens when expert number e of its rank multiplies by e + 1."""
    oracle = step.oracle()
    mine, local = oracle.sent[step.rank], oracle.num_local
    factor = torch.where(mine.topk_idx >= 0, (mine.topk_idx % local + 1) * mine.topk_weights, 0.0).sum(1)
    return oracle.expert_counts(step.rank), mine.x.float() * factor[:, None]


def work_until(rounds: Rounds, party: Party, what: str, others: Iterable[int], ranks: Iterable[int]) -> None:
    """Ranks make rounds until others have left a word."""
    others, ranks = list(others), list(ranks)
    while not party.agree(f"{what} at {rounds.made}", ranks, lambda: party.said(what, others)):
        rounds.several(5)


def come_back(group: ExpertGroup, party: Party, ranks: Iterable[int], name: str = "back") -> None:
    """What `ExpertGroup.mask` asks for, done by those that go on together. They mask all others."""
    ranks = list(ranks)
    for rank in set(range(party.num_ranks)) - set(ranks):
        group.mask(rank)
    group.synchronize()
    party.meet(f"{name}: all is done", ranks)
    for rank in ranks:
        group.mask(rank, masked=False)
    party.meet(f"{name}: go on", ranks)


def all_together(group: ExpertGroup, rounds: Rounds, case: Case) -> None:
    """Nobody is masked, and everything works."""
    rounds.made = 0  # the same routings everywhere
    assert group.masked_ranks == frozenset()
    rounds.several(12)
    rounds.carefully()
    check_round_trip(group, case, DispatchOptions())
    rounds.several(3)


CASE = Case((3, 2, 4), 6, 3, hidden=64, dtype=torch.float32)


def skip_and_return(rank: int, pg, pair, folder: str, timeout_s: float, where: str, hook: bool) -> None:
    """The lost rank makes no calls until the others have given it up; later it does, too late; then all come back.

    ``where``: whether it is missed by a dispatch, or first by a combine.
    """
    party = Party(folder, rank, 3)
    with pair.open(pg, CASE.shape, timeout_s=timeout_s, on_timeout="mask") as group:
        group.warmup()
        rounds = Rounds(group, CASE)
        rounds.several(5)
        party.meet("ready")
        if rank == LOST:
            be_away(group, rounds, party, where)
        else:
            start = time.monotonic()
            assert not rounds.one(hook=hook), "nobody was missing"
            assert time.monotonic() - start < 2.5 * timeout_s + 1, "one after the other were waited for"
            assert group.masked_ranks == {LOST}
            party.say("gave it up")
            start = time.monotonic()
            rounds.several(30)
            rounds.carefully()
            party.say("went on")
            work_until(rounds, party, "is alone", [LOST], (0, 1))  # what it sends meanwhile, nobody wants
        come_back(group, party, range(3))
        all_together(group, rounds, CASE)


def be_away(group: ExpertGroup, rounds: Rounds, party: Party, where: str) -> None:
    others = frozenset(range(party.num_ranks)) - {group.rank}
    if where == "combine":
        rounds.one(between=lambda: party.wait("went on", others))
    else:
        party.wait("went on", others)
    while group.masked_ranks != others:
        rounds.one()
    rounds.several(3)
    party.say("is alone")


@dataclass(frozen=True)
class Load:
    """What `under_load` does.

    Attributes:
        lost: Ranks that are lost; they come back one after the other.
        least: Rounds that the others make at least without them.
        stopped: Whether the test stops their processes; else they wait by themselves.
    """

    lost: tuple[int, ...]
    least: int
    stopped: bool


def under_load(rank: int, pg, pair, folder: str, timeout_s: float, load: Load) -> dict[str, int]:
    """Rounds without end; some ranks are lost on the way and come back.

    Returns:
        dict: how many rounds were made, and in how many of them somebody was lost.
    """
    party, lost = Party(folder, rank, pg.size()), load.lost
    case = Case((3, 2, 4, 1)[: pg.size()], 2 * pg.size(), 3, hidden=64, dtype=torch.float32)
    others = frozenset(range(pg.size())) - set(lost)
    with pair.open(pg, case.shape, timeout_s=timeout_s, on_timeout="mask") as group:
        group.warmup()
        rounds = Rounds(group, case)
        rounds.several(5)
        party.meet("ready")
        made = 0
        if rank in lost:
            if not load.stopped:
                party.wait("went on", others)
            while not group.masked_ranks >= others:  # stopped somewhere in here
                rounds.one()
            party.say("is alone")
        else:
            while not group.masked_ranks >= set(lost):
                rounds.one(hook=rounds.made % 2 == 1)
            rounds.made = 0
            rounds.several(load.least)
            rounds.carefully()
            party.say("went on")
            work_until(rounds, party, "is alone", lost, others)
            made, rounds.made = rounds.made, 0
        for i, back in enumerate(lost):
            if rank in others or rank in lost[: i + 1]:
                here = others | set(lost[: i + 1])
                come_back(group, party, here, f"back {back}")
                rounds.made = 0
                rounds.several(7)
                rounds.carefully()
        all_together(group, rounds, case)
    return {"made": made, "masked": rounds.masked_during}


def by_hand(rank: int, pg, pair, folder: str, both_sides: bool, timeout_s: float) -> None:
    """Ranks 0 and 1 mask rank 2, and it them, or not; they make different numbers of calls, and leave some open."""
    party, others = Party(folder, rank, 3), frozenset(range(3)) - {rank}
    away = frozenset({LOST}) if rank != LOST else others
    with pair.open(pg, CASE.shape, timeout_s=timeout_s, on_timeout="raise" if both_sides else "mask") as group:
        group.warmup()
        rounds = Rounds(group, CASE)
        rounds.several(3)
        for turn in range(2):
            if rank != LOST or both_sides:
                for other in away:
                    group.mask(other)
            else:
                while group.masked_ranks != away:
                    assert not rounds.one(), "nobody sends to this rank"
            rounds.made = 0
            rounds.several(9 if (rank == LOST) == (turn == 1) else 4)
            step = Step(replace(CASE, seed=9), rank, away)  # rows that no round has
            x, routing = step.mine().x, step.routing()
            sent = group.decode_dispatch(x, routing)
            left = [
                group.decode_combine(sent.x, sent.plan, return_hook=True),
                group.decode_dispatch(x, routing, return_hook=True),
            ]
            come_back(group, party, range(3), f"turn {turn}")
            for one in left:
                one.hook()
            rounds.made = 0
            for _ in range(2):  # in each half of a region; until rank 1 comes, what was left there could be its rows
                assert rounds.one(between=lambda: time.sleep(LATE_S if rank == 1 else 0.0))
            all_together(group, rounds, CASE)
            for one in left:
                one.hook()


def in_a_graph(rank: int, pg, pair, folder: str) -> None:
    """A CUDA graph sees masks that come and go after its capture."""
    party, away = Party(folder, rank, 3), frozenset({LOST}) if rank != LOST else frozenset({0, 1})
    with pair.open(pg, CASE.shape, timeout_s=30.0) as group:
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
            with pytest.raises(ArgumentError, match="mask: not while a CUDA graph is captured"):
                group.mask(min(away))
        for turn, masked in enumerate((frozenset(), away, frozenset(), away, frozenset())):
            torch.cuda.synchronize()
            if masked:
                for other in masked:
                    group.mask(other)
            else:
                come_back(group, party, range(3), f"turn {turn}")
            want_counts, want_sums = expected(Step(CASE, rank, masked))
            for _ in range(20 if rank != LOST or not masked else 13):
                graph.replay()
            torch.cuda.synchronize()
            assert counts.tolist() == want_counts
            torch.testing.assert_close(out.cpu(), want_sums, rtol=1e-5, atol=1e-5)
