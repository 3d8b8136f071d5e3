"""The lock of a group on CPUs that lets in one call or hook at a time; an interrupt leaves none inside."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from tokenferry.errors import ArgumentError


@dataclass(slots=True, eq=False)
class Entered:
    """A call or a hook that has entered a group, and may have left it.

    Attributes:
        before: The number of the last exchange before those of the call; None: it has made none.
        thread: The thread that makes it.
        grad_enabled: Whether gradients are enabled around it.
    """

    before: int | None = None
    thread: int = field(default_factory=threading.get_ident)
    grad_enabled: bool = field(default_factory=torch.is_grad_enabled)


class Entrance:
    """Lets one call or hook in at a time.

    Attributes:
        latest: The call or hook that has entered last.
    """

    def __init__(self) -> None:
        self.latest = Entered()
        self._inside: dict[str, Entered] = {}  # "call": the one under way; a dict, whose setdefault is atomic

    def enter(self, phase: str, entered: Entered) -> None:
        """Let a call or a hook in.

        Raises:
            ArgumentError: another one is inside: that of another thread, or the one that this one interrupts, as signal
                handlers and finalizers do. It goes on unharmed.
        """
        inside = self._inside.setdefault("call", entered)  # which no other thread can come between
        if inside is not entered:
            where = "another thread is in a call of this group"
            if inside.thread == entered.thread:
                where = "a signal handler or a finalizer has interrupted a call of this group in this thread"
            raise ArgumentError(f"{phase}: {where}; make calls and hooks one by one")
        self.latest = entered

    def leave(self, entered: Entered) -> None:
        """Let the next one in; idempotent."""
        if self._inside.get("call") is entered:
            del self._inside["call"]

    @contextlib.contextmanager
    def alone(self, phase: str) -> Iterator[None]:
        """Be inside, as `enter` says."""
        entered = Entered()
        try:
            self.enter(phase, entered)
            yield
        finally:
            self.leave(entered)

    def since(self, before: Entered) -> Entered | None:
        """Return what this thread has let in since ``before`` was `latest`, if anything."""
        latest = self.latest
        return None if latest is before or latest.thread != threading.get_ident() else latest
