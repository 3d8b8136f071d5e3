"""The first decode call of a size, for which ranks make memory together: without some of them, or in disagreement."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from support.emulated_group import HEAP_BYTES, in_processes, on_ranks
from support.emulator import Emulator
from support.lost_ranks import CROWDED_S
from support.masks import Notes, make_all_calls
from support.new_sizes import (
    Start,
    check_first_call,
    iterations_of,
    large,
    lost_at_the_start,
    missed_at_the_start,
    new_sizes_apart,
    new_sizes_by_hand,
    small,
)
from tokenferry import CapacityError, MismatchError, MoeShape, Routing

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))

ALONE_S = 0.5
"""A deadline where one rank is left."""


def warm_up_alone(rank, threads, pair, folder):
    with pair.open(None, small(2).shape, timeout_s=1.0, on_timeout="mask") as group:
        notes = Notes(folder, rank, 2)
        group._backend.context.warmup = lambda: None  # compiling may take longer than any deadline here
        notes.barrier("there")
        if rank == 0:
            group.warmup()
            assert group.masked_ranks == {1}
            check_first_call(group, small(2), frozenset({1}), hook=False)
        notes.barrier("done")


FIRST_CALLS = ("decode_dispatch", "warmup")
JOBS = {
    "two": (2, partial(lost_at_the_start, start=Start((1,), ALONE_S, within_s=20.0))),
    "three": (3, partial(lost_at_the_start, start=Start((1,), CROWDED_S, within_s=15.0, hook=True))),
    "one left": (3, partial(lost_at_the_start, start=Start((2, 0), ALONE_S, within_s=20.0))),
    **{first: (3, partial(missed_at_the_start, timeout_s=CROWDED_S, first=first)) for first in FIRST_CALLS},
    "sizes": (3, partial(new_sizes_apart, timeout_s=CROWDED_S)),
    "warmup alone": (2, warm_up_alone),
}


def make_all_sizes(*, run: Callable[..., list[Any]]) -> None:
    for ranks in (2, 3):
        for case in (small(ranks), *(replace(large(ranks), hidden=hidden) for hidden in (128, 192, 256, 320))):
            run(ranks, make_all_calls, case)


@pytest.fixture(scope="module")
def jobs(pytestconfig, tmp_path_factory) -> dict[str, Future[list[list[Any]]]]:
    """All jobs; their ranks wait at the same time."""
    todo = {
        name: partial(on_ranks, ranks, job, str(tmp_path_factory.mktemp("sizes")))
        for name, (ranks, job) in JOBS.items()
    }
    return in_processes(pytestconfig, make_all_sizes, todo)


@pytest.mark.parametrize("name", ["two", "three", "one left"])
def test_a_rank_that_never_calls_is_masked(jobs, name):
    jobs[name].result()


@pytest.mark.parametrize("first", FIRST_CALLS)
def test_a_rank_that_never_calls_is_blamed(jobs, first):
    [found] = jobs[first].result()
    assert found[:2] == [(first, 0 if first == "warmup" else 1, (2,))] * 2


def test_ranks_that_make_new_sizes_apart_come_together(jobs):
    jobs["sizes"].result()


def test_warmup_masks_a_rank_that_does_not_come(jobs):
    jobs["warmup alone"].result()


def test_a_new_size_under_masks_by_hand(run, tmp_path):
    run(3, new_sizes_by_hand, str(tmp_path))


# ---------------------------------------------------------------------- several sizes


def sizes_and_hooks(rank, threads, pair):
    """Two sizes follow on each other, each with rows under way in the memory of the one before."""
    with pair.open(None, small(3).shape) as group:
        views = [group.for_shape(replace(small(3).shape, max_tokens=tokens)) for tokens in (4, 40, 400, 4)]
        routing = Routing(torch.tensor([[0, 3, 5]] * 2), torch.ones(2, 3))
        sent = [
            view.decode_dispatch(torch.full((2, 64), 10.0 * n + rank), routing, return_hook=True)
            for n, view in enumerate(views)
        ]
        answers = []
        for n, one in enumerate(sent):
            one.hook()
            for e, count in enumerate(one.expert_counts.tolist()):
                assert count == (6 if 2 * rank + e in (0, 3, 5) else 0)
                found = one.x[e, :count, 0].tolist()
                assert found == [10.0 * n + src for src in range(3) for _ in range(2) if count]
            answers.append(views[n].decode_combine(one.x, one.plan, return_hook=True))
        for n, one in enumerate(answers):
            one.hook()
            assert one.x.unique().tolist() == [3.0 * (10.0 * n + rank)]


def test_new_sizes_while_hooks_are_pending(run):
    run(3, sizes_and_hooks)


# ---------------------------------------------------------------------- disagreement


def dispatch_and_wait(group):
    group.decode_dispatch(torch.ones(2, group.shape.hidden), Routing(torch.zeros(2, 3, dtype=torch.int64)))
    group.synchronize()


def other_sizes(rank, threads, pair, known):
    """Rank 1 calls with other sizes; if they are known, its call begins at once, where rank 0 makes memory."""
    with pair.open(None, small(2).shape) as group:
        if known:
            iterations_of(group, small(2)).one()
        view = group.for_shape(small(2).shape if rank else large(2).shape)
        with pytest.raises(MismatchError) as caught:
            dispatch_and_wait(view)
        assert "broken" in group._backend.broken
        return str(caught.value)


@pytest.mark.parametrize("known", [False, True])
def test_other_sizes(run, known):
    text = "\n".join(run(2, other_sizes, known))
    assert ("first of its size for rank 0, and not for rank 1" if known else "max_tokens is 9 on rank 0 and 3") in text


def only_the_sizes_differ(rank, threads, pair):
    with pair.open(None, small(2).shape) as group:
        view = group.for_shape(replace(small(2).shape, top_k=2 if rank else 4))
        routing = Routing(torch.zeros(2, view.shape.top_k, dtype=torch.int64 if rank else torch.int32))
        with pytest.raises(MismatchError) as caught:
            view.decode_dispatch(torch.ones(2, 64), routing)
        return str(caught.value)


def test_sizes_that_the_signature_does_not_show(run):
    """Two choices of eight bytes, and four of four."""
    texts = run(2, only_the_sizes_differ)
    assert any("memory for rows under way" in text for text in texts), texts


def full_heap(rank, threads, pair):
    """On one rank; every rank raises, and goes on with the sizes that there were."""
    with pair.open(None, small(3).shape) as group:
        known = iterations_of(group, small(3))
        known.several(2)
        view = group.for_shape(MoeShape(6, 2, 1024, 512))
        heap = group._backend.context.heap
        kept = heap.block(HEAP_BYTES - (8 << 20), 0) if rank == 1 else None
        for _ in range(3):
            with pytest.raises(
                CapacityError, match="the heap is full" if rank == 1 else r"heap of rank\(s\) \[1\] has"
            ):
                view.decode_dispatch(torch.ones(2, 1024), Routing(torch.zeros(2, 2, dtype=torch.int64)))
            known.several(2)
        del kept
        view.decode_dispatch(torch.ones(2, 1024), Routing(torch.zeros(2, 2, dtype=torch.int64)))
        known.several(2)


def test_a_full_heap(run):
    run(3, full_heap)


def scratch(rank, threads, pair):
    """It lies in the heap if enough stays free there for calls, and no call uses it."""
    with pair.open(None, small(1).shape) as group:
        backend = group._backend
        first, end = backend.context.window.base, backend.context.window.base + backend.context.window.num_bytes
        for num_bytes, inside in ((1 << 20, True), (0, False), (HEAP_BYTES, False)):
            memory = backend.scratch(num_bytes)
            assert memory.numel() == num_bytes
            assert (first <= memory.data_ptr() < end) == inside
            memory.fill_(7)
            iterations_of(group, small(1)).several(2)
            assert bool((memory == 7).all())


def test_scratch_memory(run):
    run(1, scratch)
