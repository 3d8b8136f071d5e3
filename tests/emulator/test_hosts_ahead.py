"""Calls that hosts launch before the device has begun the first of them, on the emulator.

Other tests of groups run a kernel when it is launched. Here launches wait in a stream, a thread of their own.
"""

import gc
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from support.emulated_group import TIMEOUT_S, SynchronousJit, SynchronousKernel, emulate
from support.emulator import Emulator, Stream
from tokenferry import MoeShape
from tokenferry.backends.cuda import context
from tokenferry.errors import RoutingError
from tokenferry.kernels.control_block import CONTROL_BLOCK_OFFSETS
from tokenferry.memory.empty import empty_on
from tokenferry.memory.tensor import bytes_at
from tokenferry.types import DispatchOptions, Routing

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))

_mine = threading.local()


class Queue:
    """What this thread launches waits, until `begin`; as context: then nothing is left of it."""

    def __init__(self) -> None:
        self._gate, self._stream = threading.Event(), Stream()
        self._stream.submit(self._gate.wait)

    def __enter__(self) -> "Queue":
        _mine.stream = self._stream
        return self

    def __exit__(self, *_: object) -> None:
        _mine.stream = None
        self.finish()

    def begin(self) -> None:
        """The device comes to it."""
        self._gate.set()

    def finish(self) -> None:
        """All is done."""
        self.begin()
        deadline = time.monotonic() + TIMEOUT_S
        while not self._stream.query():
            assert time.monotonic() < deadline, "a kernel does not end"
            time.sleep(1e-3)


class QueuedKernel(SynchronousKernel):
    """Runs in its turn, where the thread that launches it has a queue."""

    def launch(self, params: Any, grid: int, block: int, smem_bytes: int, stream: int) -> None:
        queue = getattr(_mine, "stream", None)
        if queue is None:
            super().launch(params, grid, block, smem_bytes, stream)
            return
        copied = type(params).from_buffer_copy(params)
        queue.submit(partial(self._go, copied, min(grid, 4), block, smem_bytes))


class QueuedJit(SynchronousJit):
    kernel_type = QueuedKernel


@pytest.fixture
def run(monkeypatch, pytestconfig) -> Callable[..., list[Any]]:
    """``run(R, job, *args)``: call ``job(rank, threads, pair, *args)`` in R threads.

    What calls make stays to the end: queued kernels use it, and no allocator here knows of streams.
    """
    kept = []

    def keeping(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def keep(*args: Any, **options: Any) -> torch.Tensor:
            made = empty(*args, **options)
            made.view(torch.uint8).fill_(POISON)
            kept.append(made)
            return made

        return keep

    monkeypatch.setattr(torch, "empty", keeping(torch.empty))
    monkeypatch.setattr(context, "empty_on", lambda device: keeping(empty_on(device)))
    return emulate(pytestconfig, QueuedJit)


SHAPE = MoeShape(4, 2, 16, 8)
INDEX = torch.tensor([[0, 3], [1, 2], [2, 0]])
BAD = torch.tensor([[0, 3], [1, 9], [2, 0]])
DEVICE = DispatchOptions(counts="device")
POISON = 0xA5
"""Bytes of what is made and not written."""


def rows(value: float) -> torch.Tensor:
    return torch.full((3, 16), float(value))


def values(x: torch.Tensor) -> set[float]:
    return set(x.flatten().tolist())


def several(rank, pg, pair):
    """Rank 0 asks for an expert that there is none, and learns it when calls of every kind are queued behind that."""
    with pair.open(pg, SHAPE, timeout_s=20.0) as group:
        kept: list[Any] = []
        first = group.dispatch(rows(5), Routing(INDEX))

        def calls(index: torch.Tensor) -> list[Any]:
            found: list[Any] = []
            for n, chosen in enumerate((index, INDEX)):
                x, chosen = rows(10 * rank + n), chosen.clone()
                sent = group.dispatch(x, Routing(chosen), options=DEVICE)
                found.append((sent, group.combine(sent.x, sent.plan).x, group.combine(first.x, first.plan).x))
                kept.extend((x, chosen, *found[-1]))
            return found

        with Queue() as queue:
            found = calls(BAD if rank == 0 else INDEX)
            if rank == 0:
                queue.finish()
                with pytest.raises(RoutingError, match="is 9"):
                    group.synchronize()
                found = calls(INDEX)
        group.synchronize()
        for n, (sent, home, again) in enumerate(found):
            came = int(sent.plan.src_counts.sum())
            assert values(sent.x[:came]) == {n, 10.0 + n}, f"rank {rank}: rows of other calls came to call {n}"
            assert values(home) == {2.0 * (10 * rank + n)}
            assert values(again) == {10.0}


def test_calls_behind_a_bad_one_are_no_ops(run):
    """Otherwise they would pair with earlier calls of the peers: rows of one call would arrive in another."""
    run(2, several)


def bad_call_before_one_that_waits(rank, pg, pair):
    """A call that waits for its counts raises the error of the bad one before it."""
    with pair.open(pg, SHAPE, timeout_s=20.0) as group, Queue() as queue:
        x, bad, good = rows(rank), BAD.clone(), INDEX.clone()
        pinned = group._backend.context.pinned
        wait = pinned.wait_for_call_number

        def begin_and_wait(*args: Any) -> bool:
            queue.begin()
            came = wait(*args)
            if rank == 0:
                queue.finish()  # what the host does next is in the order of the stream
            return came

        pinned.wait_for_call_number = begin_and_wait
        kept = [group.dispatch(x, Routing(bad if rank == 0 else good), options=DEVICE)]
        if rank == 0:
            with pytest.raises(RoutingError, match="is 9"):
                group.dispatch(x, Routing(good))
            assert not group._backend.broken
            kept.append(group.dispatch(x, Routing(good), options=DEVICE))
        sent = group.dispatch(x, Routing(good))
        queue.finish()
        assert values(sent.x) == {0.0, 1.0}


def test_a_launched_call_raises_the_error_of_an_earlier_one(run):
    """It is a no-op, too; otherwise its peers would receive it twice."""
    run(2, bad_call_before_one_that_waits)


def several_of_decode(rank, pg, pair, hook):
    """As `several`: behind the bad dispatch a combine along an earlier plan, and another dispatch."""
    with pair.open(pg, SHAPE, timeout_s=20.0) as group:
        weights, kept = torch.ones(3, 2), []
        first = group.decode_dispatch(rows(5), Routing(INDEX, weights))

        def calls(index: torch.Tensor) -> list[Any]:
            found = []
            for n, chosen in enumerate((index, INDEX)):
                x, y, chosen = rows(10 * rank + n), first.x.clone(), chosen.clone()
                sent = group.decode_dispatch(x, Routing(chosen, weights), return_hook=hook)
                home = None if n else group.decode_combine(y, first.plan, return_hook=hook)
                for one in (sent, home) if hook else ():
                    if one is not None:
                        one.hook()
                found += [sent, home]
                kept.extend((x, y, chosen))
            kept.extend(found)
            return found

        with Queue() as queue:
            found = calls(BAD if rank == 0 else INDEX)
            if rank == 0:
                queue.finish()
                context = group._backend.context
                received = bytes_at(
                    context.window.base + CONTROL_BLOCK_OFFSETS["received"], 16, context.device, context.window
                )
                assert received.view(torch.int32).tolist() == [0, 1, 0, 0]  # the first dispatch
                with pytest.raises(RoutingError, match="is 9"):
                    group.synchronize()
                found = calls(INDEX)
        group.synchronize()
        for n, sent in enumerate(found[::2]):
            counts = sent.expert_counts.tolist()
            came = {value for e in (0, 1) for value in values(sent.x[e, : counts[e]])}
            assert came == {n, 10.0 + n}, f"rank {rank}: rows of other calls came to call {n}"
        assert values(found[1].x) == {10.0}


@pytest.mark.parametrize("hook", [False, True])
def test_decode_calls_behind_a_bad_one_are_no_ops(run, hook):
    run(2, several_of_decode, hook)


def close_early(rank, pg, pair):
    group = pair.open(pg, SHAPE)
    with Queue():
        x, index = rows(1), INDEX.clone()
        sent = group.dispatch(x, Routing(index), options=DEVICE)
        memory = weakref.ref(group._backend.context.pinned._memory)
        group.close()
        kept = sent.x
        del group, sent
        gc.collect()
        assert memory() is not None, "dispatch_notify is queued, and the words that it will write are freed"
    assert kept.shape[1] == 16


def test_pinned_words_outlive_what_is_queued(run):
    """Their group may be closed and forgotten; kernels in the stream, or in a CUDA graph, still write them."""
    run(1, close_early)
