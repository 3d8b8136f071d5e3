"""What a DeepEP call returns as its event: something to wait for.

The CPU backend has no streams and returns with its work done, so there is never anything left to wait for; the objects
keep DeepEP's rules nevertheless, so that a program that breaks them learns it here.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from torch import Tensor

from tokenferry.errors import ArgumentError


class EventHandle:
    """Marks what has been submitted so far; on the CPU that is done already."""

    def current_stream_wait(self) -> None:
        """Return when everything that was submitted before the handle was made is done: at once. Local."""


class EventOverlap:
    """An event, the tensors that must live until it has passed, and what to do then. Local; a context manager.

    ``with event:`` runs its body while the work goes on, and waits at the end.

    Args:
        event: What to wait for; None where the call that made it has already waited (``async_finish=False``).
        extra_tensors: Kept alive with this object.
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[Tensor, ...] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Callable[[], object] | None = None
        self._release_at_exit = False

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Wait, then call the hook that was registered, once.

        Args:
            release_handle: Drop ``event`` and ``extra_tensors`` afterwards; the object cannot be waited for again.

        Raises:
            ArgumentError: there is no event, because the call that made this was synchronous.
        """
        if self.event is None:
            raise ArgumentError(
                "EventOverlap.current_stream_wait: event: expected an EventHandle, found None: the call was made with "
                "async_finish=False (or this object was released); test `event.event is not None` before waiting"
            )
        self.event.current_stream_wait()
        hook, self.hook_after_wait = self.hook_after_wait, None
        if hook is not None:
            hook()
        if release_handle:
            self.event = self.extra_tensors = None

    def register_hook_after_wait(self, hook: Callable[[], object]) -> None:
        """Have ``hook()`` called after the next wait; replaces one that is registered already."""
        self.hook_after_wait = hook

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """For ``with event(release_handle=True):``."""
        self._release_at_exit = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.event is not None:
            self.current_stream_wait(self._release_at_exit)
