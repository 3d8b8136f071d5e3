"""Jobs in which ranks of a group of several nodes on the CUDA backend are lost to decode calls, and come back."""

import threading
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from support.decoding import Step, check_combined, check_encoding, check_received
from support.masks import Iterations, Notes, all_together, come_back, expected, work_until
from tokenferry import DecodeStats, ExpertGroup, Scale
from tokenferry.testing.cases import Case

NUM_RANKS = 4
LOST = 3
"""The rank that is lost, on node 1 of two; rank 1 is its rail peer."""
OTHERS = (0, 1, 2)
FINDS = {0: frozenset(), 1: {LOST}, 2: {LOST}, LOST: {1, 2}}
"""Whom each rank finds to be lost: it waits for those of its node and of its rail."""
CASE = Case((3, 2, 4, 3), 8, 3, hidden=128, dtype=torch.float32)


@dataclass(frozen=True)
class NodeAbsence:
    """How `lose_on_two_nodes` loses a rank.

    Attributes:
        first_call: The first call of the others that misses it: "dispatch" or "combine".
        hook: Whether the others receive by hook.
        fast: Whether that combine is a fast one, which begins without an exchange.
    """

    first_call: str
    hook: bool = False
    fast: bool = False


def warm_up(pg, pair) -> None:
    """Make each kind of call with a long deadline: the first ones of a process take longer than all others."""
    with pair.open(pg, CASE.shape) as group:
        iterations = Iterations(group, CASE)
        iterations.several(2)
        iterations.carefully()


def make_all_calls(rank: int, pg, pair) -> None:
    """Make the calls of the jobs here with a long deadline."""
    with pair.open(pg, CASE.shape, on_timeout="mask") as group:
        all_together(group, Iterations(group, CASE), CASE)
        step = Step(CASE, rank, relays=group.topology.nodes)
        check_encoding(group, step, dispatched(group, step), torch.float32, "fp8", fast=False)


def lose_on_two_nodes(rank: int, pg, pair, folder: str, timeout_s: float, absence: NodeAbsence) -> int:
    """The lost rank calls only after the others have gone on without it; then all resynchronise.

    Returns:
        int: nanoseconds that this rank counted for the lost one in the call that missed it.
    """
    notes = Notes(folder, rank, NUM_RANKS)
    warm_up(pg, pair)
    with pair.open(pg, CASE.shape, timeout_s=timeout_s, on_timeout="mask") as group:
        group.warmup()
        iterations, apart = Iterations(group, CASE), Iterations(group, CASE, frozenset({LOST}))
        notes.barrier("begin")
        iterations.several(3)
        late_s = timeout_s / 8 if rank == LOST else 0.0
        assert iterations.one(between=lambda: time.sleep(late_s)), "a rank that is late in time was lost"
        notes.barrier("ready")
        waited = 0
        if rank == LOST:
            stay_away(group, notes, timeout_s, absence)
        else:
            start = time.monotonic()
            waited = one_undefined(group, absence)
            assert time.monotonic() - start < 2 * timeout_s + 2, "the lost rank was waited for again and again"
            assert group.masked_ranks == FINDS[rank]
            apart.several(4)
            assert group.masked_ranks == FINDS[rank], "nobody else was lost"
            apart.carefully()
            check_encoding(group, apart._step(2), dispatched(group, apart._step(2)), torch.float32, "fp8", fast=False)
            notes.leave("went on")
            work_until(apart, notes, "is alone", [LOST], OTHERS)
        come_back(group, notes, range(NUM_RANKS))
        all_together(group, iterations, CASE)
    return waited


def dispatched(group: ExpertGroup, step: Step):
    sent = group.decode_dispatch(step.mine().x, step.routing())
    check_received(step, sent, None)
    return sent


def one_undefined(group: ExpertGroup, absence: NodeAbsence) -> int:
    """Make a pair of calls that lose a rank; return the wait for it. If only the combine misses it, check sums."""
    step, stats = Step(CASE, group.rank), DecodeStats(wait_ns=torch.zeros(NUM_RANKS, dtype=torch.int64))
    sent = group.decode_dispatch(step.mine().x, step.routing(), return_hook=absence.hook, stats=stats)
    sent.hook()
    numerics = "fast" if absence.fast else "exact"
    home = group.decode_combine(sent.x, sent.plan, return_hook=absence.hook, numerics=numerics, stats=stats)
    home.hook()
    group.synchronize()
    if absence.first_call == "combine" and group.rank in OTHERS:  # all rows have come, and some do not come back
        found = Step(CASE, group.rank, frozenset({LOST}), relays=group.topology.nodes).oracle().sent[group.rank]
        weights = torch.where(found.topk_idx >= 0, found.topk_weights, 0.0).sum(1)
        torch.testing.assert_close(home.x, found.x.float() * weights[:, None], rtol=1e-5, atol=1e-5)
    return int(stats.wait_ns[LOST])


def stay_away(group: ExpertGroup, notes: Notes, timeout_s: float, absence: NodeAbsence) -> None:
    """Be late, for a dispatch or in the middle of a pair; then call until nobody is left to wait for."""
    if absence.first_call == "dispatch":
        notes.wait("went on", OTHERS)
    else:
        step = Step(CASE, group.rank)
        sent = group.decode_dispatch(step.mine().x, step.routing())
        notes.wait("went on", OTHERS)
        group.decode_combine(sent.x, sent.plan, numerics="fast" if absence.fast else "exact")
    try:
        start = time.monotonic()
        while group.masked_ranks != FINDS[LOST]:
            one_undefined(group, NodeAbsence("dispatch"))
        # Those that have masked it have told it.
        assert time.monotonic() - start < timeout_s, "it waited for ranks that had masked it"
    finally:
        notes.leave("is alone")  # the others wait for that


def lose_a_put(rank: int, pg, pair, folder: str, timeout_s: float, armed: threading.Event) -> None:
    """A message from a rank to its rail peer is lost, and both go on calling, without each other."""
    notes = Notes(folder, rank, NUM_RANKS)
    warm_up(pg, pair)
    with pair.open(pg, CASE.shape, timeout_s=timeout_s, on_timeout="mask") as group:
        group.warmup()
        iterations = Iterations(group, CASE)
        notes.barrier("begin")
        iterations.several(2)
        notes.barrier("ready")
        armed.set()
        one_undefined(group, NodeAbsence("dispatch"))
        notes.barrier("lost")
        armed.clear()
        finds = {1: {LOST}, LOST: {1}}.get(rank, frozenset())
        assert group.masked_ranks == finds
        for _ in range(3):
            one_undefined(group, NodeAbsence("dispatch"))
        assert group.masked_ranks == finds, "they are not lost to others"
        come_back(group, notes, range(NUM_RANKS))
        all_together(group, iterations, CASE)


def masked_by_hand(rank: int, pg, pair, lost: tuple[int, ...]) -> None:
    """Some ranks and all others go on without each other; then all together again, without coming back."""
    case = Case((3, 2, 4, 1), 8, 3, hidden=128, dtype=torch.float32)
    away = frozenset(lost) if rank not in lost else frozenset(range(NUM_RANKS)) - set(lost)
    with pair.open(pg, case.shape) as group:
        everyone = Step(case, rank)
        apart = Step(case, rank, away, relays=group.topology.nodes)
        for step in (everyone, apart, everyone, apart, everyone):
            for other in set(range(NUM_RANKS)) - {rank}:
                group.mask(other, masked=other in step.away)
            assert group.masked_ranks == step.away
            status = torch.full((NUM_RANKS,), 7, dtype=torch.int32, device=group.device)
            group._backend.write_masks(status)
            assert status.tolist() == [int(other in step.away) for other in range(NUM_RANKS)]
            for fp8 in (Scale.FLOAT32, None):
                sent = group.decode_dispatch(step.mine().x, step.routing(), quantize=fp8, return_hook=fp8 is None)
                sent.hook()
                check_received(step, sent, fp8)
                check_combined(group, step, sent, torch.float32)
                check_combined(group, step, sent, torch.float32, fast=True, hook=True)
                check_encoding(group, step, sent, torch.float32, "fp8", fast=True)


class Replays:
    """A pair of calls whose launches are made again and again, as those of a CUDA graph.

    Args:
        group: The group.
        recorder: Records what the kernels of this thread get.
    """

    def __init__(self, group: ExpertGroup, recorder) -> None:
        self._group, self._recorder = group, recorder
        step = Step(CASE, group.rank)
        mine = step.mine()
        with recorder.record(group._backend.context) as self._dispatch:
            sent = group.decode_dispatch(mine.x, step.routing())
        self._counts, self._x = sent.expert_counts, sent.x
        self._factors = torch.arange(1.0, 1.0 + sent.x.shape[0])[:, None, None]
        self._y = sent.x * self._factors
        self._kept = (mine, sent)
        with recorder.record(group._backend.context) as self._combine:
            self._out = ExpertGroup.decode_combine(group, self._y, sent.plan).x

    def one(self) -> tuple[list[int], Tensor]:
        """Replay; return the rows of each expert, and the sums."""
        self._recorder.replay(self._dispatch)
        torch.mul(self._x, self._factors, out=self._y)
        self._recorder.replay(self._combine)
        return self._counts.tolist(), self._out.clone()

    def check(self, times: int, lost: frozenset[int]) -> None:
        """Replay some times, and check what each gives."""
        group = self._group
        counts, sums = expected(Step(CASE, group.rank, group.masked_ranks | lost, relays=group.topology.nodes))
        for i in range(times):
            got, out = self.one()
            assert got == counts, f"replay {i}"
            torch.testing.assert_close(out, sums, rtol=1e-5, atol=1e-5, msg=lambda text, i=i: f"replay {i}: {text}")


def lose_in_replays(rank: int, pg, pair, recorder, folder: str, timeout_s: float) -> None:
    """A rank does not replay for a while; the others do, with the same launches; then it comes back."""
    notes, nobody = Notes(folder, rank, NUM_RANKS), frozenset()
    warm_up(pg, pair)
    with pair.open(pg, CASE.shape, timeout_s=timeout_s, on_timeout="mask") as group:
        group.warmup()
        group.decode_dispatch(Step(CASE, rank).mine().x, Step(CASE, rank).routing())  # makes the memory for rows
        notes.barrier("begin")
        graph = Replays(group, recorder)
        graph.check(5, nobody)
        notes.barrier("ready")
        if rank == LOST:
            notes.wait("went on", OTHERS)
            for _ in range(3):  # late: they have gone on
                graph.one()
            assert group.masked_ranks == FINDS[rank]
            notes.leave("is alone")
        else:
            graph.one()
            assert group.masked_ranks == FINDS[rank]
            graph.check(12, frozenset({LOST}))
            notes.leave("went on")
            graph.check(6, frozenset({LOST}))
            notes.wait("is alone", [LOST])
        come_back(group, notes, range(NUM_RANKS))
        graph.check(7, nobody)
        all_together(group, Iterations(group, CASE), CASE)


def lost_from_the_start(rank: int, pg, pair, folder: str, timeout_s: float) -> None:
    """A rank makes its group and no call: the others mask it in their first one, which also makes memory."""
    notes = Notes(folder, rank, NUM_RANKS)
    warm_up(pg, pair)
    with pair.open(pg, CASE.shape, timeout_s=timeout_s, on_timeout="mask") as group:
        notes.barrier("begin")
        if rank != LOST:
            one_undefined(group, NodeAbsence("dispatch"))
            assert group.masked_ranks == FINDS[rank]
            Iterations(group, CASE, frozenset({LOST})).several(3)
            notes.leave("done")
        notes.wait("done", OTHERS)
        come_back(group, notes, range(NUM_RANKS))
        all_together(group, Iterations(group, CASE), CASE)


def meet_without_one(rank: int, pg, pair, timeout_s: float) -> None:
    """A rank does not come to `warmup`."""
    warm_up(pg, pair)
    with pair.open(pg, CASE.shape, timeout_s=timeout_s, on_timeout="mask") as group:
        if rank != LOST:
            group.warmup()
            assert group.masked_ranks == FINDS[rank]
        pair.barrier()


def synchronize_with_an_open_hook(rank: int, pg, pair, late: threading.Event) -> None:
    """The network is slow while a hook is open."""
    with pair.open(pg, CASE.shape) as group:
        step = Step(CASE, rank)
        group.decode_dispatch(step.mine().x, step.routing())
        before = pg.network.num_complete(rank)
        pair.barrier()
        late.set()
        sent = group.decode_dispatch(step.mine().x, step.routing(), return_hook=True)
        group.synchronize()
        assert pg.network.num_complete(rank) == before + 1, "what it has put to the other node is under way"
        sent.hook()
        check_received(step, sent, None)
