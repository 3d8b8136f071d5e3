"""The stream of a call of `ElasticBuffer`, and the events that it waits for, by the rules of DeepEP 2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tokenferry.checks import check_flags
from tokenferry.compat.deep_ep.streams import Lane, when_of
from tokenferry.compat.deep_ep.utils.event import EventHandle, EventOverlap
from tokenferry.errors import ArgumentError

Event = EventHandle | EventOverlap | None
"""The type of ``previous_event``: DeepEP 2 takes an EventHandle, DeepEP 1 an EventOverlap."""

_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class ElasticWhen:
    """The arguments of a call that concern streams.

    Attributes:
        previous_event: Event to wait for, or None.
        before_epilogue: Another one; DeepEP waits for it later, before it writes results.
        asynchronous: Run on the communication stream, and return an event.
        allocate_on_comm_stream: Checked but otherwise unused: results belong to both streams.
    """

    previous_event: object = None
    before_epilogue: object = None
    asynchronous: bool = False
    allocate_on_comm_stream: bool = False


def run(
    lane: Lane, call: str, when: ElasticWhen, inputs: tuple[Any, ...], work: Callable[[], _T]
) -> tuple[_T, EventOverlap]:
    """Run ``work``, which reads ``inputs``, as `Lane.run`, after both events. Local.

    Returns:
        tuple: The result of ``work``, and the call's event, which is empty if the call was synchronous.

    Raises:
        ArgumentError: an event is of another type, a flag is not a bool, or ``previous_event`` was given without
            ``allocate_on_comm_stream``.
    """
    if type(when.asynchronous) is not bool or type(when.allocate_on_comm_stream) is not bool:
        asynchronous, on_comm_stream = when.asynchronous, when.allocate_on_comm_stream
        check_flags(call, async_with_compute_stream=asynchronous, allocate_on_comm_stream=on_comm_stream)
    previous = _event(call, "previous_event", when.previous_event)
    late = _event(call, "previous_event_before_epilogue", when.before_epilogue)
    if previous is not None and not when.allocate_on_comm_stream:
        raise ArgumentError(
            f"{call}: previous_event: needs allocate_on_comm_stream=True, as in DeepEP; pass both, or leave it out"
        )

    def work_after_both() -> _T:
        if late is not None:
            late.current_stream_wait()
        return work()

    return lane.run(call, when_of(previous, when.asynchronous, False), inputs, work_after_both)


def _event(call: str, name: str, event: object) -> EventHandle | None:
    """Return the event to wait for, or None."""
    event = event.event if isinstance(event, EventOverlap) else event
    if event is None or isinstance(event, EventHandle):
        return event
    raise ArgumentError(
        f"{call}: {name}: expected an EventHandle, an EventOverlap or None, got {type(event).__name__}; pass "
        "ElasticBuffer.capture() or the event of an earlier call"
    )
