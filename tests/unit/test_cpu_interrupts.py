"""Interrupts of calls on CPUs: at every line on the way to the last message and back, in our functions and torch's."""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch

import tokenferry
from tokenferry import ExpertGroup, MoeShape, Routing, ambient, api, resolve
from tokenferry.backends.cpu import exchange
from tokenferry.transports import segment

T, H = 3, 16
BACKEND = str(Path(exchange.__file__).parent)
AROUND = tuple(str(each.__file__) for each in (api, ambient, resolve, contextlib, torch.autograd.grad_mode))
"""Files with the other functions that a call is in."""
ROWS = torch.arange(T * H, dtype=torch.float32, device="cpu").view(T, H)
WHERE = Routing(torch.zeros(T, 1, dtype=torch.int64), torch.ones(T, 1, dtype=torch.float32))


def is_in_a_call(frame: FrameType | None) -> bool:
    """Return whether a frame is of a call, or of what it calls, and not of a test."""
    while frame is not None and not frame.f_code.co_filename.startswith((BACKEND, str(ambient.__file__))):
        frame = frame.f_back
    return frame is not None


@contextmanager
def interrupted_at(line: int) -> Iterator[list[str]]:
    """Raise KeyboardInterrupt before the n-th line of a call; yields a list, empty unless that has happened."""
    left, happened = [line], list[str]()

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        if not frame.f_code.co_filename.startswith((BACKEND, *AROUND)) or frame.f_code.co_name == "__del__":
            return None  # Python drops what is raised in a __del__
        if not is_in_a_call(frame):
            return None
        if event == "line" and not happened:
            left[0] -= 1
            if left[0] == 0:
                happened.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield happened
    finally:
        sys.settrace(before)


@pytest.fixture(autouse=True)
def grad_mode() -> Iterator[None]:
    """Restore what interrupts of torch's own functions have left."""
    yield
    gc.collect()
    torch.set_grad_enabled(True)


def calls_of(group: ExpertGroup) -> dict[str, Callable[[], torch.Tensor]]:
    """Calls that return the rows of `ROWS`, whatever was called before."""
    sent, decoded = group.dispatch(ROWS, WHERE), group.decode_dispatch(ROWS, WHERE)
    return {
        "dispatch": lambda: group.dispatch(ROWS, WHERE).x,
        "redispatch": lambda: group.redispatch(ROWS, sent.plan).x,
        "combine": lambda: group.combine(ROWS, sent.plan).x,
        "decode_dispatch": lambda: group.decode_dispatch(ROWS, WHERE).x[0, :T],
        "decode_combine": lambda: group.decode_combine(decoded.x, decoded.plan).x,
    }


@pytest.mark.parametrize("name", ["dispatch", "redispatch", "combine", "decode_dispatch", "decode_combine"])
def test_an_interrupt_breaks_the_group_once_something_was_sent(name):
    """Else this rank would be a call behind its peers, and get rows of the next one, without a word."""
    group, line, harmless, broke = None, 0, 0, 0
    while True:
        line, held = line + 1, None
        if group is None:
            group = ExpertGroup(None, MoeShape(1, 1, H, 4), backend="cpu")
            calls = calls_of(group)
        made = group._backend._exchange._last_call
        with interrupted_at(line) as where:
            try:
                calls[name]()
            except KeyboardInterrupt as error:
                held = error  # with the functions that it has ended, as where it is being handled
                assert where, held
        if not where:
            break
        if group._backend.broken:
            with pytest.raises(tokenferry.ClosedError, match="broken by an earlier KeyboardInterrupt"):
                calls[name]()
            group, broke = None, broke + 1
        else:
            assert group._backend._exchange._last_call == made, where
            assert torch.equal(calls[name](), ROWS), where
            harmless += 1
    group.close()
    assert harmless > 5
    assert broke > 20


@pytest.mark.parametrize("name", ["decode_dispatch", "decode_combine"])
def test_an_interrupt_of_a_hook(name):
    """It breaks the group, or the hook can be called again."""
    line = 0
    while True:
        line, held = line + 1, None
        with ExpertGroup(None, MoeShape(1, 1, H, 4), backend="cpu") as group:
            done = group.decode_dispatch(ROWS, WHERE, return_hook=name == "decode_dispatch")
            if name == "decode_combine":
                done = group.decode_combine(done.x, done.plan, return_hook=True)
            with interrupted_at(line) as where:
                try:
                    done.hook()
                except KeyboardInterrupt as error:
                    held = error
                    assert where, held
            if not group._backend.broken:
                done.hook()
                assert torch.equal(done.x.view(-1, H)[:T], ROWS), where
        if not where:
            break
    assert line > 20


def test_an_interrupt_of_no_grad_leaves_gradients_on():
    with ExpertGroup(None, MoeShape(1, 1, H, 4), backend="cpu") as group:
        with (
            mock.patch.object(torch.no_grad, "__exit__", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            group.dispatch(ROWS, WHERE)
        assert torch.is_grad_enabled()
        assert "broken by an earlier KeyboardInterrupt" in group._backend.broken


def test_a_segment_that_was_interrupted_while_it_was_made_can_be_dropped():
    segment.Segment.__new__(segment.Segment).__del__()


def test_an_exchange_that_was_interrupted_while_it_was_made_can_be_dropped():
    exchange.Pending.__new__(exchange.Pending).__del__()
