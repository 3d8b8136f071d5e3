"""`EventOverlap` and `EventHandle`: DeepEP's rules about waiting."""

import pytest
import torch

from tokenferry.compat.deep_ep import Buffer, EventHandle, EventOverlap
from tokenferry.errors import ArgumentError


def test_waiting_runs_the_hook_once_and_keeps_the_event():
    ran = []
    event = Buffer.capture()
    event.register_hook_after_wait(lambda: ran.append(1))
    event.current_stream_wait()
    event.current_stream_wait()
    assert ran == [1]
    assert isinstance(event.event, EventHandle)


def test_releasing_drops_what_was_kept():
    event = EventOverlap(EventHandle(), (torch.zeros(1),))
    event.current_stream_wait(release_handle=True)
    assert event.event is None
    assert event.extra_tensors is None


def test_a_synchronous_call_has_nothing_to_wait_for():
    with pytest.raises(ArgumentError, match="async_finish=False"):
        EventOverlap().current_stream_wait()


def test_the_context_waits_at_its_end():
    order = []
    event = EventOverlap(EventHandle())
    event.register_hook_after_wait(lambda: order.append("waited"))
    with event:
        order.append("body")
    assert order == ["body", "waited"]
    with event(release_handle=True):
        assert event.event is not None
    assert event.event is None
    with EventOverlap():
        pass  # nothing to wait for is no error here: the same `with` serves both modes
