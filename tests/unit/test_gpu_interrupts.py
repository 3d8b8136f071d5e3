"""Interrupts of calls on GPUs: at lines of ours behind the first launch, in one node and across nodes.

Kernels do nothing here. A rank that has sent must not go on as if it had not: its caller makes the call again, and from
then on its peers are a call behind.
"""

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
from support.silent_kernels import SilentGroup
from support.silent_nodes import SilentNodes
from tokenferry import ExpertGroup, MoeShape, ResourceError, Routing

SOURCES = str(Path(tokenferry.__file__).parent)
T, H, SHAPE = 4, 16, MoeShape(4, 2, 16, 8)
ROWS = torch.ones(T, H, dtype=torch.bfloat16, device="cpu")
WHERE = Routing(torch.tensor([[0, 2]] * T), torch.ones(T, 2))


def is_finalizer(frame: FrameType | None) -> bool:
    """Return whether a frame is of a finalizer, or of what it calls: Python drops what is raised there."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


@contextmanager
def interrupted_at(
    line: int, num_sent: Callable[[], int], error: type[BaseException] = KeyboardInterrupt
) -> Iterator[list[str]]:
    """Raise an error before the n-th line behind the first launch; yields a list: empty, or where that was."""
    left, happened, before = [line], list[str](), num_sent()

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(SOURCES):
            return None
        if event == "line" and not happened and num_sent() > before:
            left[0] -= 1
            if left[0] <= 0 and not is_finalizer(frame):
                happened.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
                raise error
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield happened
    finally:
        sys.settrace(outer)


def call_of(group: ExpertGroup, name: str) -> Callable[[], object]:
    """Return a call, or the hook of one."""
    sent, decoded = group.dispatch(ROWS, WHERE), group.decode_dispatch(ROWS, WHERE)
    y = torch.ones(decoded.x.shape, dtype=torch.bfloat16, device="cpu")
    if name == "hook of decode_dispatch":
        return group.decode_dispatch(ROWS, WHERE, return_hook=True).hook
    if name == "hook of decode_combine":
        return group.decode_combine(y, decoded.plan, return_hook=True).hook
    calls: dict[str, Callable[[], object]] = {
        "dispatch": lambda: group.dispatch(ROWS, WHERE),
        "redispatch": lambda: group.redispatch(ROWS, sent.plan),
        "combine": lambda: group.combine(group.empty_rows(sent.plan), sent.plan),
        "decode_dispatch": lambda: group.decode_dispatch(ROWS, WHERE),
        "decode_dispatch with a hook": lambda: group.decode_dispatch(ROWS, WHERE, return_hook=True),
        "decode_combine": lambda: group.decode_combine(y, decoded.plan),
        "decode_combine with a hook": lambda: group.decode_combine(y, decoded.plan, return_hook=True),
    }
    return calls[name]


CALLS = (
    "dispatch", "redispatch", "combine", "decode_dispatch", "decode_dispatch with a hook", "decode_combine",
    "decode_combine with a hook", "hook of decode_dispatch", "hook of decode_combine",
)  # fmt: skip


@pytest.mark.parametrize(
    ("of", "fast_path", "step"),
    [(SilentGroup, True, 3), (SilentGroup, False, 3), (SilentNodes, True, 17)],
    ids=["one node", "one node, not the fast path", "across nodes"],
)
def test_an_interrupt_of_a_call_that_has_sent_breaks_the_group(of, fast_path, step):
    went_on, num_lines = [], 0
    with SilentGroup.workspaces_agree():
        for name in CALLS:
            for line in range(1, 1000, step):
                silent = of(SHAPE, fast_path=fast_path)
                call = call_of(silent.group, name)
                with interrupted_at(line, lambda launches=silent.launches: len(launches)) as happened:
                    try:
                        call()
                    except KeyboardInterrupt:
                        if not silent.group._backend.broken:
                            went_on.append(f"{name} at {happened[0]}")
                if not happened:
                    break
                num_lines += 1
    assert went_on == []
    assert num_lines > 40


@pytest.mark.parametrize("name", ["dispatch", "decode_dispatch"])
def test_memory_that_is_refused_behind_the_launches_breaks_the_group(name):
    silent = SilentGroup(SHAPE)
    with SilentGroup.workspaces_agree():
        call = call_of(silent.group, name)
        with interrupted_at(3, lambda: len(silent.launches), MemoryError), pytest.raises(ResourceError) as caught:
            call()
    assert "(the group is broken)" in str(caught.value)


def test_an_interrupt_of_a_capture_breaks_nothing():
    """What a graph has captured of a call was not sent."""
    silent = SilentGroup(SHAPE)
    call, streams = call_of(silent.group, "redispatch"), silent.group._backend.context._streams
    captured = mock.patch.multiple(streams, capture=lambda _: 7, eager=lambda: None)
    with captured, interrupted_at(1, lambda: len(silent.launches)), pytest.raises(KeyboardInterrupt):
        call()
    call()


def test_a_refused_call_breaks_nothing():
    """Neither does an exception before a call begins."""
    silent = SilentGroup(SHAPE)
    with pytest.raises(tokenferry.ShapeError):
        silent.group.dispatch(ROWS, Routing(torch.tensor([[0]])))
    with pytest.raises(TypeError):
        silent.group.dispatch(ROWS, WHERE.topk_idx, WHERE.topk_weights)
    silent.group.dispatch(ROWS, WHERE)
