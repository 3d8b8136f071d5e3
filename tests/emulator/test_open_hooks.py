"""Hooks that are open while something else happens: a rank is masked, a later call receives, streams change."""

import pytest
import torch

from support.emulator import Emulator
from tokenferry import MoeShape, Routing
from tokenferry.errors import RoutingError

pytestmark = [
    pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing())),
    pytest.mark.usefixtures("both_paths"),
]

SHAPE = MoeShape(6, 2, 64, 4)
"""The shape of groups of three ranks with two experts each."""


def choosing(*experts: int) -> Routing:
    """Four tokens that all choose these."""
    return Routing(torch.tensor([experts] * 4), torch.tensor([[1.0, 10.0]] * 4))


def rows(value: float) -> torch.Tensor:
    return torch.full((4, 64), float(value))


def dispatch_and_combine(group, x, routing, *, hook=False):
    """A dispatch and a combine; expert e multiplies by e + 1."""
    sent = group.decode_dispatch(x, routing)
    factors = torch.arange(1.0, 3.0)[:, None, None] + 2 * group.rank
    return group.decode_combine(sent.x * factors, sent.plan, return_hook=hook)


# ---------------------------------------------------------------------- masks


def mask_while_combining(rank, threads, pair):
    """Then ranks 0 and 1 combine from rank 1 what came from rank 2 before."""
    with pair.open(None, SHAPE, timeout_s=20.0) as group:
        away = (0, 1) if rank == 2 else (2,)
        open_one = dispatch_and_combine(group, rows(7), choosing(4, 0), hook=True)
        threads.wait()
        for other in away:
            group.mask(other)
        open_one.hook()
        for n in range(0 if rank == 2 else 4):
            found = dispatch_and_combine(group, rows(100 + n), choosing(2, 0)).x
            assert found.unique().tolist() == [(3.0 + 10.0) * (100 + n)], f"rank {rank}, call {n} after the mask"


def test_a_mask_while_a_combine_is_open(run):
    """Rows of the masked rank are received; otherwise a later call would take them for another rank's."""
    run(3, mask_while_combining)


def mask_while_dispatching(rank, threads, pair):
    with pair.open(None, SHAPE, timeout_s=60.0) as group:
        away = (0, 1) if rank == 2 else (2,)
        open_one = group.decode_dispatch(rows(7), choosing(4, 0), return_hook=True)
        threads.wait()
        for other in away:
            group.mask(other)
        open_one.hook()
        for n in range(2):
            dispatch_and_combine(group, rows(100 + n), choosing(2 * rank, 2 * rank + 1))
        threads.wait()
        for other in away:
            group.mask(other, masked=False)
        threads.wait()
        workspace = group._backend.decoder.workspaces.now
        packets = workspace._memory[workspace.rows_at :]
        assert int((packets != 0xFF).sum()) == 0, "packets that no call will receive"
        threads.wait()
        for n in range(3):
            sent = group.decode_dispatch(rows(1000 + n), choosing(4, 0))
            for e, count in enumerate(sent.expert_counts.tolist()):
                found = sent.x[e, :count].unique().tolist()
                assert found in ([], [1000.0 + n]), f"rank {rank}, call {n} together again"


def test_masks_while_a_dispatch_is_open(run):
    """The same for a dispatch: its rows must not appear in a call after all ranks are unmasked."""
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

    def eager(self):
        return None if self.graph else self.now

    def record(self, stream):
        return stream

    def wait(self, stream, event, *, outside):
        self.waits.append((stream, event))


def late_hook(rank, threads, pair):
    with pair.open(None, SHAPE, timeout_s=20.0) as group:
        streams = group._backend.context._streams = Streams()
        first, *_ = [group.decode_dispatch(rows(1), choosing(0, 2), return_hook=True) for _ in range(3)]
        streams.now = 2
        first.hook()
        assert (2, 1) in streams.waits


def test_a_hook_whose_rows_a_later_call_has_received(run):
    """That was on another stream: the one of the hook waits for it, or would read rows before they are there."""
    run(1, late_hook)


def around_a_capture(rank, threads, pair):
    with pair.open(None, SHAPE, timeout_s=20.0) as group:
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


def fault_in_a_capture(rank, threads, pair):
    with pair.open(None, SHAPE, timeout_s=20.0) as group:
        streams = group._backend.context._streams = Streams()
        group.decode_dispatch(rows(1), choosing(0, 2))
        group.decode_dispatch(rows(1), choosing(0, 6))
        streams.now, streams.graph = 3, 77
        group.decode_dispatch(rows(1), choosing(0, 2))
        assert group._backend.context.pinned.faulty
        streams.now, streams.graph = 1, 0
        with pytest.raises(RoutingError, match="is 6"):
            group.decode_dispatch(rows(1), choosing(0, 2))


def test_a_capture_does_not_raise_errors_of_earlier_calls(run):
    """Otherwise the work that resumes calls would be captured instead of executed."""
    run(1, fault_in_a_capture)
