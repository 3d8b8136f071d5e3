"""Receives that a decode call has left to its hook, and the order in which they have to happen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.ambient import not_compiled
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.errors import ArgumentError


@dataclass(slots=True, eq=False)
class PendingRecv:
    """The second half of a call whose rows have been sent.

    Attributes:
        call: The call whose rows have been sent.
        launch: Function that enqueues the kernel that receives.
        tensors: Tensors that the kernel uses.
        done: Whether it has been enqueued.
    """

    call: Call
    launch: Callable[[Call], None]
    tensors: tuple[Tensor | None, ...]
    done: bool = False


def _nothing(_: Call) -> None:
    """Take the place of a launch that is not wanted any more, and would keep its workspace."""


class Channel:
    """The last two sends of one direction, each with its receive if that is still pending.

    A send overwrites the half of the peers' workspaces that the send two before it used. So that send is received
    first, on every rank: if its hook has not been called, it is called now.

    Attributes:
        idle: Whether neither of the last two has left its receive to a hook. The next send then overwrites nothing, and
            need not be noted unless it does so itself.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._last: deque[PendingRecv | None] = deque(maxlen=2)
        self.idle = True

    @property
    def caught_up(self) -> bool:
        """Whether no receive is pending."""
        return self.idle or all(pending is None or pending.done for pending in self._last)

    def fills(self, tensor: Tensor) -> bool:
        """Return whether a pending receive has yet to write to the memory of a tensor."""
        storage = tensor.untyped_storage().data_ptr()
        return any(
            part is not None and part.untyped_storage().data_ptr() == storage
            for pending in self._last
            if pending is not None
            for part in pending.tensors  # none once it is done
        )

    def receive_overwritten(self, call: Call) -> None:
        """Receive what the next send will overwrite.

        Raises:
            ArgumentError: a CUDA graph is being captured, and the receive belongs to a call outside of it.
        """
        if len(self._last) == 2:
            self._receive_first(self._last[0], call.signature.phase, capturing=call.capturing)

    def receive_all(self, phase: str, *, capturing: bool) -> None:
        """Receive everything that is pending, before another call, named ``phase``, begins.

        Raises:
            ArgumentError: as `receive_overwritten`.
        """
        for pending in tuple(self._last):
            self._receive_first(pending, phase, capturing=capturing)

    def _receive_first(self, pending: PendingRecv | None, phase: str, *, capturing: bool) -> None:
        if pending is None or pending.done:
            return
        if capturing and not pending.call.capturing:
            raise ArgumentError(
                f"{phase}: the hook of an earlier {pending.call.signature.phase} has to be called before a CUDA graph "
                "is captured"
            )
        if capturing == pending.call.capturing:  # a hook that was never called in its capture never will be
            self.receive(pending)

    def sent(self, pending: PendingRecv | None) -> None:
        """Note a send; None: the same kernel has received."""
        self._last.append(pending)
        self.idle = not any(self._last)

    def receive_open(self) -> None:
        """Enqueue the receives that are pending, except those that belong to a capture."""
        for pending in tuple(self._last):
            if pending is not None and not pending.done and not pending.call.capturing:
                self.receive(pending)

    def forget(self) -> None:
        """Drop all pending receives: their hooks do nothing."""
        for pending in self._last:
            if pending is not None:
                pending.done, pending.tensors, pending.launch = True, (), _nothing
        self.close()

    def close(self) -> None:
        """Forget pending receives; their hooks raise ClosedError once the group is closed."""
        self._last.clear()
        self.idle = True

    @not_compiled  # a program calls it as a hook
    def receive(self, pending: PendingRecv) -> None:
        """Enqueue the second half of a call, once.

        Raises:
            ArgumentError: it was sent inside of a capture and is received outside of it, or the other way round.
        """
        if pending.done:
            self._context.order_after_calls()  # a later call has received it, perhaps on another stream
            return
        before = pending.call
        call = self._context.resume(before)
        if call.capturing != before.capturing:
            raise ArgumentError(
                f"{before.signature.phase}: hook: a CUDA graph has to capture both the call and its hook, or neither"
            )
        if call.stream != before.stream and not call.capturing and self._context.device.type == "cuda":
            stream = torch.cuda.current_stream(self._context.device)
            for tensor in pending.tensors:
                if tensor is not None:
                    tensor.record_stream(stream)
        try:
            pending.launch(call)
            pending.done, pending.tensors, pending.launch = True, (), _nothing
        except BaseException as error:
            if not isinstance(error, Exception):  # an interrupt: perhaps it is enqueued, and must not be a second time
                self._context.break_off(error)
            raise
