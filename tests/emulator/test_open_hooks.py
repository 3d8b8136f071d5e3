"""Hooks that are open while something else happens: a rank is masked, a later call receives, streams change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.emulated_group import emulate
from support.emulator import Emulator
from tokenferry import MoeShape, Routing
from tokenferry.errors import RoutingError

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing()))

SHAPE = MoeShape(6, 2, 64, 4)
"""Of three ranks with two experts each."""


@pytest.fixture
def run(pytestconfig) -> Callable[..., list[Any]]:
    """``run(R, job, *args)``: call ``job(rank, crowd, hall, *args)`` in R threads."""
    return emulate(pytestconfig)


def choosing(*experts: int) -> Routing:
    """Four tokens that all choose these."""
    return Routing(torch.tensor([experts] * 4), torch.tensor([[1.0, 10.0]] * 4))


def rows(value: float) -> torch.Tensor:
    return torch.full((4, 64), float(value))


def pair(group, x, routing, *, hook=False):
    """A dispatch and a combine; expert e multiplies by e + 1."""
    sent = group.decode_dispatch(x, routing)
    factors = torch.arange(1.0, 3.0)[:, None, None] + 2 * group.rank
    return group.decode_combine(sent.x * factors, sent.plan, return_hook=hook)


# ---------------------------------------------------------------------- masks


def mask_while_combining(rank, crowd, hall):
    """Then ranks 0 and 1 combine from rank 1 what came from rank 2 before."""
    with hall.open(None, SHAPE, timeout_s=20.0) as group:
        away = (0, 1) if rank == 2 else (2,)
        open_one = pair(group, rows(7), choosing(4, 0), hook=True)
        crowd.wait()
        for other in away:
            group.mask(other)
        open_one.hook()
        for n in range(0 if rank == 2 else 4):
            found = pair(group, rows(100 + n), choosing(2, 0)).x
            assert found.unique().tolist() == [(3.0 + 10.0) * (100 + n)], f"rank {rank}, call {n} after the mask"


def test_a_mask_while_a_combine_is_open(run):
    """What the masked rank has sent is received; left where it lies, it would be another rank's two calls later."""
    run(3, mask_while_combining)


def mask_while_dispatching(rank, crowd, hall):
    with hall.open(None, SHAPE, timeout_s=60.0) as group:
        away = (0, 1) if rank == 2 else (2,)
        open_one = group.decode_dispatch(rows(7), choosing(4, 0), return_hook=True)
        crowd.wait()
        for other in away:
            group.mask(other)
        open_one.hook()
        for n in range(2):
            pair(group, rows(100 + n), choosing(2 * rank, 2 * rank + 1))
        crowd.wait()
        for other in away:
            group.mask(other, masked=False)
        crowd.wait()
        workspace = group._backend.decoder.workspaces.now
        packets = workspace._memory[workspace.rows_at :]
        assert int((packets != 0xFF).sum()) == 0, "packets that nobody will take"
        crowd.wait()
        for n in range(3):
            sent = group.decode_dispatch(rows(1000 + n), choosing(4, 0))
            for e, count in enumerate(sent.expert_counts.tolist()):
                found = sent.x[e, :count].unique().tolist()
                assert found in ([], [1000.0 + n]), f"rank {rank}, call {n} together again"


def test_masks_while_a_dispatch_is_open(run):
    """The same of a dispatch, whose rows would be new ones when all are together again."""
    run(3, mask_while_dispatching)


# ---------------------------------------------------------------------- streams


class Streams:
    """Streams that only keep count: ``waits`` has (stream, the one it was put behind)."""

    def __init__(self):
        self.now, self.graph, self.waits = 1, 0, []

    def current(self):
        return self.now

    def capture(self, stream):
        return self.graph

    def is_eager(self, stream):
        return stream == self.now and not self.graph

    def record(self, stream):
        return stream

    def wait(self, stream, event, *, outside):
        self.waits.append((stream, event))


def late_hook(rank, crowd, hall):
    with hall.open(None, SHAPE, timeout_s=20.0) as group:
        streams = group._backend.context._streams = Streams()
        first, *_ = [group.decode_dispatch(rows(1), choosing(0, 2), return_hook=True) for _ in range(3)]
        streams.now = 2
        first.hook()
        assert (2, 1) in streams.waits


def test_a_hook_whose_rows_a_later_call_has_received(run):
    """That was on another stream: the one of the hook waits for it, or would read rows before they are there."""
    run(1, late_hook)


def around_a_capture(rank, crowd, hall):
    with hall.open(None, SHAPE, timeout_s=20.0) as group:
        context, waited = group._backend.context, []
        context._driver.cuda.cuStreamSynchronize = lambda stream: (waited.append(stream), (0,))[1]
        streams = context._streams = Streams()
        group.decode_dispatch(rows(1), choosing(0, 2))
        streams.now, streams.graph = 3, 77
        group.decode_dispatch(rows(1), choosing(0, 2))
        streams.now, streams.graph = 2, 0
        waited.clear()
        group.synchronize()
        assert waited == [1]
        group.decode_dispatch(rows(1), choosing(0, 2))
        assert streams.waits == [(2, 1)]


def test_calls_before_and_after_a_capture(run):
    """They are in order although calls in between were captured; and `synchronize` waits for those before."""
    run(1, around_a_capture)


def fault_in_a_capture(rank, crowd, hall):
    with hall.open(None, SHAPE, timeout_s=20.0) as group:
        streams = group._backend.context._streams = Streams()
        group.decode_dispatch(rows(1), choosing(0, 2))
        group.decode_dispatch(rows(1), choosing(0, 6))
        streams.now, streams.graph = 3, 77
        group.decode_dispatch(rows(1), choosing(0, 2))
        assert group._backend.context.pinned.faulty
        streams.now, streams.graph = 1, 0
        with pytest.raises(RoutingError, match="is 6"):
            group.decode_dispatch(rows(1), choosing(0, 2))


def test_a_capture_raises_nothing_that_calls_before_it_met(run):
    """What makes calls run again would be in the graph, and not where it is needed."""
    run(1, fault_in_a_capture)
