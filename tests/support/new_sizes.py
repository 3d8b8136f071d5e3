"""Jobs in which ranks are lost before the first decode call of a size, for which the CUDA backend makes memory.

Threads on the emulator run them, too; the CPU backend runs those that do not look into the backend.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from support.decoding import Step
from support.masks import LOST, Iterations, Notes, come_back, expected, warm_up
from tokenferry import ArgumentError, ExpertGroup, PeerTimeout
from tokenferry.testing.cases import Case

TOKENS = (3, 2, 4, 1)


def small(ranks: int) -> Case:
    return Case(TOKENS[:ranks], 2 * ranks, 3, hidden=64, dtype=torch.float32)


def large(ranks: int) -> Case:
    """More tokens and wider rows than the small one."""
    return replace(small(ranks), tokens=tuple(3 * tokens for tokens in TOKENS[:ranks]), hidden=128)


def iterations_of(group: ExpertGroup, case: Case) -> Iterations:
    return Iterations(group.for_shape(case.shape), case)


def memory_of(group: ExpertGroup) -> tuple[int, ...]:
    """Return where rows under way lie on each rank."""
    return group._backend.decoder.workspaces.now.addresses


def check_first_call(group: ExpertGroup, case: Case, lost: frozenset[int], *, hook: bool) -> None:
    """Make a dispatch that finds ranks missing before it has sent anything: all that it returns is right."""
    step = Step(case, group.rank, lost)
    view = group.for_shape(case.shape)
    sent = view.decode_dispatch(step.mine().x, step.routing(), return_hook=hook)
    sent.hook()
    experts = torch.arange(1.0, 1.0 + sent.x.shape[0], device=sent.x.device)[:, None, None]
    got = view.decode_combine(sent.x * experts, sent.plan, return_hook=hook)
    got.hook()
    status = torch.full((group.num_ranks,), 9, dtype=torch.int32, device=group.device)
    group._backend.write_masks(status)  # before anything waits
    assert status.tolist() == [int(rank in lost) for rank in range(group.num_ranks)]
    group.synchronize()
    assert group.masked_ranks == lost
    counts, sums = expected(step)
    assert sent.expert_counts.tolist() == counts
    torch.testing.assert_close(got.x.cpu(), sums, rtol=1e-5, atol=1e-5)


def stay() -> None:
    """Neither end nor stop."""


@dataclass(frozen=True)
class Start:
    """How ranks are lost right after the constructor.

    Attributes:
        lost: The ranks.
        timeout_s: The deadline of the group.
        within_s: The first call of the others must not take longer.
        hook: Whether the others receive by hook.
        leave: What lost ranks do.
    """

    lost: tuple[int, ...]
    timeout_s: float
    within_s: float
    hook: bool = False
    leave: Callable[[], None] = stay


def lost_at_the_start(rank: int, pg, pair, folder: str, start: Start) -> None:
    """Ranks that are there for the constructor only: the others mask them, and decode in two sizes."""
    ranks, lost = pg.size(), frozenset(start.lost)
    notes = Notes(folder, rank, ranks)
    others = sorted(set(range(ranks)) - lost)
    warm_up(pg, pair, small(ranks))  # a rank that compiles is late, too
    with pair.open(pg, small(ranks).shape, timeout_s=start.timeout_s, on_timeout="mask") as group:
        notes.barrier("there")
        if rank in lost:
            start.leave()
            notes.wait("done", others)  # a group that closes tells its peers
            return
        begin = time.monotonic()
        check_first_call(group, small(ranks), lost, hook=start.hook)
        assert time.monotonic() - begin < start.within_s, "the lost ranks were waited for again and again"
        iterations_of(group, small(ranks)).several(3)
        iterations = iterations_of(group, large(ranks))
        iterations.several(3)
        iterations.carefully()
        notes.barrier("done", others)


def missed_at_the_start(rank: int, pg, pair, folder: str, timeout_s: float, first: str) -> tuple[str, int, tuple]:
    """The same without masks: return phase, call and peers of the error."""
    ranks = pg.size()
    notes, others = Notes(folder, rank, ranks), range(ranks - 1)
    with pair.open(pg, small(ranks).shape, timeout_s=timeout_s) as group:
        group._backend.context.warmup = lambda: None  # compiling may take longer than any deadline here
        notes.barrier("there")
        if rank == ranks - 1:
            notes.wait("done", others)
            return ("", 0, ())
        call = group.warmup if first == "warmup" else iterations_of(group, small(ranks)).one
        with pytest.raises(PeerTimeout) as caught:
            call()
        notes.barrier("done", others)
        return caught.value.phase, caught.value.call, caught.value.peers


def new_sizes_apart(rank: int, pg, pair, folder: str, timeout_s: float) -> None:
    """Ranks 0 and 1 mask rank 2 as late, and it them; both sides begin other sizes; then all come together."""
    notes, others = Notes(folder, rank, 3), (0, 1)
    with pair.open(pg, small(3).shape, timeout_s=timeout_s, on_timeout="mask") as group:
        notes.barrier("begin")
        if rank == LOST:
            notes.wait("went on", others)
            begin = time.monotonic()
            check_first_call(group, large(3), frozenset(others), hook=False)
            assert time.monotonic() - begin < timeout_s, "a rank that was masked waited for those that masked it"
            for hidden in (192, 256):
                iterations_of(group, replace(large(3), hidden=hidden)).several(1)
        else:
            check_first_call(group, small(3), frozenset({LOST}), hook=False)
            iterations_of(group, large(3)).several(2)
            notes.leave("went on")
        come_back(group, notes, range(3))
        assert group.masked_ranks == frozenset()
        for case in (small(3), replace(large(3), hidden=320)):
            iterations_of(group, case).several(4)
        kept = memory_of(group)
        come_back(group, notes, range(3), "again")
        assert memory_of(group) == kept, "nothing was made apart, so that all could go on with what they had"
        iterations = iterations_of(group, small(3))
        iterations.several(4)
        iterations.carefully()


def new_sizes_by_hand(rank: int, pg, pair, folder: str) -> None:
    """Masks on both sides, and the first call of a size: afterwards ranks come back as lost ones do."""
    notes, away = Notes(folder, rank, 3), frozenset({LOST}) if rank != LOST else frozenset({0, 1})
    with pair.open(pg, small(3).shape, timeout_s=60.0) as group:
        iterations_of(group, small(3)).several(2)
        for other in away:
            group.mask(other)
        iterations_of(group, large(3)).several(2)
        for other in away:
            group.mask(other, masked=False)
        view, step = group.for_shape(large(3).shape), Step(large(3), rank)
        with pytest.raises(ArgumentError, match=r"rank\(s\) .* were masked when .* come back as lost ranks do"):
            view.decode_dispatch(step.mine().x, step.routing())
        come_back(group, notes, range(3))
        iterations_of(group, large(3)).several(3)
