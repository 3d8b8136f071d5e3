"""The events that DeepEP's calls return.

The CPU backend has no streams and returns with its work done, so there is nothing to wait for; the objects keep
DeepEP's rules nevertheless, so that a program that breaks them fails on the CPU too. In a process that uses CUDA, an
event marks a position in torch's current stream.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tokenferry.ambient import methods_not_compiled
from tokenferry.checks import check_flags
from tokenferry.compat.deep_ep.current_stream import current_stream
from tokenferry.errors import ArgumentError


@methods_not_compiled
class EventHandle:
    """A mark behind the work submitted so far to torch's current CUDA stream; on the CPU that work is already done."""

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        self._kept: object = None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # else nothing can have been submitted
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(current_stream())

    @classmethod
    def behind(cls, stream: torch.cuda.Stream) -> EventHandle:
        """Return a mark behind the work submitted so far to ``stream``."""
        made = cls.__new__(cls)
        made._kept = None
        made._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        made._event.record(stream)
        return made

    def current_stream_wait(self) -> None:
        """Make later work on the current stream wait for the marked work. Local, returns at once."""
        if self._event is not None:
            current_stream().wait_event(self._event)
        self._kept = None  # whatever reuses their memory from now on comes later

    def delay(self, stream: torch.cuda.Stream) -> None:
        """Make later work on a stream wait for the marked work. Local, returns at once."""
        if self._event is not None:
            stream.wait_event(self._event)

    def keep(self, inputs: object) -> None:
        """Keep the inputs of a call alive as long as this handle, or until the program waits for it."""
        self._kept = inputs

    def has_passed(self) -> bool:
        """Return whether the marked work is done; not while a CUDA graph is captured."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]


@methods_not_compiled
class EventOverlap:
    """An event, the tensors that must live until it has passed, and a hook to call then. Local; a context manager.

    ``with event:`` runs its body while the work continues, and waits at the end.

    Args:
        event: The event to wait for; None if the call that returned this has already waited (``async_finish=False``).
        extra_tensors: Tensors to keep alive with this object.

    Raises:
        ArgumentError: ``event`` is neither an `EventHandle` nor None.
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[Tensor, ...] | None = None) -> None:
        if event is not None and not isinstance(event, EventHandle):
            raise ArgumentError(
                f"EventOverlap: event: expected an EventHandle or None, got {type(event).__name__}; pass "
                "EventHandle(), or use what Buffer.capture() returns as it is"
            )
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Callable[[], object] | None = None
        self._release_at_exit = False

    def current_stream_wait(self, release_handle: bool = False) -> Any:  # noqa: ANN401 - the result of any hook
        """Wait, then call the hook that was registered, once.

        Args:
            release_handle: Drop ``event`` and ``extra_tensors`` afterwards; the object cannot be waited for again.

        Returns:
            The result of the hook; None if there is none (any more).

        Raises:
            ArgumentError: there is no event, because the call that made this was synchronous; or ``release_handle`` is
                not a bool.
        """
        if type(release_handle) is not bool:
            check_flags("EventOverlap.current_stream_wait", release_handle=release_handle)
        if self.event is None:
            raise ArgumentError(
                "EventOverlap.current_stream_wait: event: expected an EventHandle, found None: the call was made with "
                "async_finish=False or without async_with_compute_stream=True (or this object was released); test "
                "`event.event is not None` before waiting"
            )
        self.event.current_stream_wait()
        hook, self.hook_after_wait = self.hook_after_wait, None
        result = None if hook is None else hook()
        if release_handle:
            self.event = self.extra_tensors = None
        return result

    def wait(self) -> Any:  # noqa: ANN401 - see current_stream_wait
        """Wait as `current_stream_wait`, of which this is another name since DeepEP 2.5."""
        return self.current_stream_wait()

    def register_hook_after_wait(self, hook: Callable[[], object]) -> None:
        """Call ``hook()`` after the next wait; replaces a hook that is registered already.

        Raises:
            ArgumentError: ``hook`` cannot be called.
        """
        if not callable(hook):
            raise ArgumentError(
                f"EventOverlap.register_hook_after_wait: hook: expected a function, got {type(hook).__name__}"
            )
        self.hook_after_wait = hook

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """Return this object, for ``with event(release_handle=True):``."""
        check_flags("EventOverlap", release_handle=release_handle)
        self._release_at_exit = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.event is not None:
            self.current_stream_wait(self._release_at_exit)
