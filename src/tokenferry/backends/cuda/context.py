"""The context of a CUDA group: resources that its calls share, their order on the device, and errors that break it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.faults import FlightRecorder, Pinned
from tokenferry.backends.cuda.peers import Peers
from tokenferry.backends.cuda.runtime import Runtime
from tokenferry.backends.cuda.signature import Signature
from tokenferry.errors import ArgumentError, CapacityError, ClosedError, PeerTimeout, RoutingError
from tokenferry.forked import forget_in_child
from tokenferry.jit.driver import check
from tokenferry.jit.kernel import Kernel, KernelSpec
from tokenferry.jit.params import Items, Packer
from tokenferry.kernels.all import SPECS
from tokenferry.kernels.control_block import (
    CONTROL_BLOCK_BYTES,
    CONTROL_BLOCK_OFFSETS,
    FIRST_OFFSET,
    MAX_RANKS,
    SIGNATURE_WORDS,
    Fault,
)
from tokenferry.memory.empty import empty_on
from tokenferry.memory.tensor import bytes_at
from tokenferry.memory.window import Window

_MAX_TEMPLATES = 512
_RECOVERABLE = (RoutingError, CapacityError)
"""Errors that leave all ranks in step: found before anything was sent, or by all ranks together."""
_NONE_MASKED = memoryview(bytes(4 * MAX_RANKS)).cast("I")


@dataclass(slots=True)
class Call:
    """One call of a group.

    Attributes:
        number: Number of the call, counted by its group.
        stream: Stream on which it runs.
        capturing: Whether a CUDA graph captures it.
        alive: A bit for each rank that takes part.
        signature: Signature of the call.
        wait_ns: Address of ``[R]`` int64 to which kernels add the nanoseconds waited for each rank, or 0.
        skips_masked: Whether masked ranks take no part.
    """

    number: int
    stream: int
    capturing: bool
    alive: int
    signature: Signature
    wait_ns: int
    skips_masked: bool = False


def call_packer(spec: KernelSpec, *fields: str | Items, waits: bool = False, last_offset: int | None = None) -> Packer:
    """Return a writer of everything in a kernel's params that differs from call to call.

    Its values are `Call.wait_ns`, if the kernel counts that; `Call.alive` and `Call.number`; the words of the
    signature; the words of the handshake behind it that differ, mostly offsets; and the kernel's own fields.

    Args:
        spec: The kernel.
        fields: Its own fields; they have to be the first in its spec.
        waits: Whether the time that the kernel waits is counted where `Call.wait_ns` says.
        last_offset: The last word of the handshake that is given, of those from `FIRST_OFFSET` on; None: there is none.
    """
    num_offsets = 0 if last_offset is None else last_offset + 1 - FIRST_OFFSET
    offsets = [Items("handshake", FIRST_OFFSET, num_offsets)] if num_offsets else []
    return Packer(
        spec.params.struct,
        *(["wait_ns"] if waits else []),
        "alive",
        "call_number",
        Items("handshake", 0, SIGNATURE_WORDS, raw=True),
        *offsets,
        *fields,
    )


class LaunchTemplate:
    """A kernel, and params in which everything that calls of one geometry share is filled in.

    ``pack`` writes the rest: every call writes all of it, so that nothing is left over from the call before. The fields
    that calls share are set by the function that makes the template.

    Attributes:
        params: The params struct of the kernel.
        pack: Writes what differs from call to call; see `call_packer`.
        block: Threads of a block.
        smem_bytes: Dynamic shared memory of a block.
    """

    __slots__ = ("block", "kernel", "pack", "params", "smem_bytes")

    def __init__(self, kernel: Kernel, packer: Packer) -> None:
        self.kernel = kernel
        self.params: Any = kernel.new_params()
        self.block = 32
        self.smem_bytes = 0
        self.pack: Callable[..., None] = packer.bind(self.params)

    def launch(self, grid: int, stream: int) -> None:
        """Enqueue the kernel."""
        self.kernel.launch(self.params, grid, self.block, self.smem_bytes, stream)


class Context:
    """The resources and the state that the calls of one rank share. For one thread at a time.

    Args:
        window: The window of this rank, shared by all; the control block at its start is zero.
        runtime: Kernels and streams of the device.
        timeout_s: Seconds that each wait may take.
        mask_late: Whether decode calls mask a rank that is late, instead of raising.
        first_rank: The first rank of this node in the whole group.

    Attributes:
        all_ranks: A bit for each rank.
        empty: Makes tensors on the device of this rank, in memory of torch.
        latest_call: Number of the call that has begun last.
        smem_bytes: Shared memory that a block may have on this GPU.
    """

    def __init__(
        self, window: Window, runtime: Runtime, timeout_s: float, *, mask_late: bool = False, first_rank: int = 0
    ) -> None:
        self.window = window
        self.rank = window.rank
        self.num_ranks = window.num_ranks
        self.device = window.device
        self.empty = empty_on(window.device)
        self.timeout_s = timeout_s
        self.mask_late = mask_late
        self.jit = runtime.jit
        self.heap = window.heap(CONTROL_BLOCK_BYTES)
        self.pinned = Pinned(pin=window.device.type == "cuda")
        self.flight_recorder = FlightRecorder(self.rank, first_rank)
        self._masked: set[int] = set()
        self.broken: str | None = None
        self.num_sms = runtime.num_sms
        self.smem_bytes = runtime.smem_bytes
        self.templates: BoundedDict[tuple[Any, ...], LaunchTemplate] = BoundedDict(_MAX_TEMPLATES)
        self._driver = runtime.driver
        self._streams = runtime.streams
        self.all_ranks = (1 << self.num_ranks) - 1
        self.latest_call = 0
        self._capturing = False  # whether that was in the capture of a CUDA graph
        self._last: dict[int, int] = {}  # stream of the last call, by capture (0: none)
        self._peers = Peers()
        self._notified_peers = False  # that this group has ended
        self._inherited = False
        forget_in_child(self, Context.forget)

    def dynamic_bytes(self, spec: KernelSpec) -> int:
        """Return the dynamic shared memory that a block of a kernel may have on this GPU."""
        return self.smem_bytes - spec.static_smem

    # ------------------------------------------------------------------ one call

    def begin(self, signature: Signature, *, skip_masked: bool = False, wait_ns: int = 0) -> Call:
        """Number a call, raise errors of earlier ones, and order the current stream after them.

        Args:
            signature: Signature of the call.
            skip_masked: Whether masked ranks take no part.
            wait_ns: See `Call`.

        Raises:
            ClosedError: the group was closed or is broken.
            TokenferryError: the error of an earlier call, found by a kernel.
        """
        stream, capture = self._order(signature.phase)
        number = self.latest_call = self.latest_call % 0xFFFFFFFF + 1
        capturing = self._capturing = capture != 0
        self.flight_recorder.note(number, signature)
        alive = self._not_masked() if skip_masked else self.all_ranks
        return Call(number, stream, capturing, alive, signature, wait_ns, skip_masked)

    def begin_eager(self, signature: Signature, wait_ns: int = 0, *, skip_masked: bool = False) -> Call | None:
        """Begin a call as `begin` does if nothing has to be done for it but to number it; else return None.

        That is: the group is whole, no kernel has recorded an error, no CUDA graph is being captured, and the current
        stream is that of the last call.
        """
        stream = self._streams.eager()
        if stream is None or self._last.get(0) != stream or self.pinned.words[0] or self.broken:
            return None
        number = self.latest_call = self.latest_call % 0xFFFFFFFF + 1
        self._capturing = False
        self.flight_recorder.note(number, signature)
        alive = self._not_masked() if skip_masked else self.all_ranks
        return Call(number, stream, False, alive, signature, wait_ns, skip_masked)

    def resume(self, call: Call) -> Call:
        """Return a call again, to be continued on the current stream; as `begin`, without a new number.

        Raises:
            ClosedError: the group was closed or is broken.
            TokenferryError: the error of an earlier call, found by a kernel.
        """
        stream, capture = self._order(call.signature.phase)
        return Call(call.number, stream, capture != 0, call.alive, call.signature, call.wait_ns, call.skips_masked)

    def masked_ranks(self) -> frozenset[int]:
        """Return the ranks that decode calls skip: masked by the user, or by a kernel whose wait for one timed out."""
        if self.mask_late and self.pinned.masked != _NONE_MASKED:
            self._masked.update(rank for rank in range(self.num_ranks) if self.pinned.masked[rank])
        return frozenset(self._masked)

    def _not_masked(self) -> int:
        """Return a bit for each rank that decode calls do not skip."""
        return self.all_ranks & ~sum(1 << rank for rank in self.masked_ranks())

    def nobody_masked(self) -> bool:
        """Return whether decode calls skip no rank."""
        return not self._masked and (not self.mask_late or self.pinned.masked == _NONE_MASKED)

    def watch(self, peers: Peers) -> None:
        """Notice from now on when a peer's process ends."""
        peers.watch(self.pinned.ended)
        self._peers = peers

    def mask(self, rank: int) -> None:
        """Skip a rank in the decode calls that begin from now on."""
        self._masked.add(rank)

    def unmask(self, rank: int) -> bool:
        """Stop skipping a rank; returns whether a kernel had masked it, after a timeout."""
        lost = self.pinned.masked[rank] != 0
        self.pinned.masked[rank] = 0
        self._masked.discard(rank)
        return lost

    def order_after_calls_outside_graphs(self, what: str) -> None:
        """Order the current stream after all calls, for work that is not a call.

        Raises:
            ArgumentError: a CUDA graph is being captured.
        """
        if self._streams.capture(self._streams.current()):
            raise ArgumentError(f"{what}: not while a CUDA graph is captured; do it before or afterwards")
        self.order_after_calls()

    def order_after_calls(self) -> tuple[int, int]:
        """Order the current stream after all calls; raises none of their errors.

        A call in a CUDA graph is not ordered against one outside of it: the user decides when a graph runs.

        Returns:
            tuple: the stream, and its capture, or 0.
        """
        stream = self._streams.current()
        capture = self._streams.capture(stream)
        before = self._last.get(capture)
        if before != stream:
            if before is not None:
                self._streams.wait(stream, self._streams.record(before), outside=False)
            self._last = {number: at for number, at in self._last.items() if number == 0} | {capture: stream}
        return stream, capture

    def current_stream(self) -> int:
        """The current stream of torch in this thread, as a raw handle."""
        return self._streams.current()

    def _order(self, phase: str) -> tuple[int, int]:
        """Raise errors of earlier calls, and order the current stream after them; returns it and its capture, or 0."""
        if self.broken:
            raise ClosedError(f"{phase}: the group {self.broken}; make a new ExpertGroup")
        stream, capture = self.order_after_calls()
        if self.pinned.faulty and not capture:  # a captured call runs later, if at all
            self.raise_recorded()
        return stream, capture

    def raise_recorded(self) -> None:
        """Raise the error that a kernel has recorded, if there is one.

        Raises:
            TokenferryError: the error of an earlier call.
        """
        if not self.pinned.faulty:
            return
        error = self.flight_recorder.explain(self.pinned.take_record())
        if isinstance(error, _RECOVERABLE):
            self._run_again()
        else:
            self._notified_peers = True  # by the kernel
            self.break_off(error)
        try:
            raise error
        finally:
            del error  # a reference cycle through this frame would keep the memory of the call alive

    def _run_again(self) -> None:
        """Clear ``stopped``, which makes kernels behind an aborted call no-ops, in stream order after all of these."""
        self.order_after_calls()
        stopped = self.window.base + CONTROL_BLOCK_OFFSETS["stopped"]
        bytes_at(stopped, 4, self.device, self.window).zero_()

    def breaking_off(self, *handled: type[BaseException]) -> BreakingOff:
        """Break the group if the block raises, because peers wait for its work; not for ``handled`` errors."""
        return BreakingOff(self, handled)

    def break_off(self, error: BaseException) -> None:
        """Break the group: its ranks may be out of step."""
        self.broken = f"is broken by an earlier {type(error).__name__}: {error}"

    def interrupted(self, _call: str, before: int, error: BaseException) -> None:
        """See `tokenferry.backends.base.Interruptible`.

        A call in the capture of a CUDA graph has sent nothing. One for which torch has no memory has sent nothing
        either, or has broken the group itself.
        """
        if self.latest_call == before or self.broken or self._capturing or isinstance(error, torch.OutOfMemoryError):
            return
        self.break_off(error)

    def wait_for_counts(self, call: Call, *, may_overflow: bool = False) -> bool:
        """Wait until the counts of a dispatch are in pinned memory; other threads run meanwhile.

        Returns:
            bool: True. With ``may_overflow`` False if there are more rows on any rank than the limit of the call: all
            ranks have aborted it, and can make it again.

        Raises:
            TokenferryError: a kernel has recorded an error.
        """
        # A kernel ahead of this call may take two deadlines before it records its timeout (kernels/combine_push).
        waited_s = 3 * self.timeout_s
        if not self.pinned.wait_for_call_number(call.number, waited_s):
            raise _late_stream(self, call, waited_s)
        if may_overflow and self.pinned.overflowed(call.number):
            self.pinned.take_record()
            self._run_again()
            return False
        if self.pinned.words[0]:
            self.raise_recorded()
        return True

    def wait_for_words(self, call: Call, counted: memoryview) -> None:
        """Wait as `wait_for_counts`, for other words of pinned memory, which begin with the number of the call."""
        waited_s = 3 * self.timeout_s
        if not self.pinned.wait_for(counted, call.number, waited_s):
            raise _late_stream(self, call, waited_s)
        if self.pinned.words[0]:
            self.raise_recorded()

    def synchronize(self) -> None:
        """Wait for all work of this rank's calls, and raise their errors."""
        if 0 in self._last:
            with self._driver.current():  # handle 0 is the default stream of the current device
                check(self._driver.cuda.cuStreamSynchronize(self._last[0]), "waiting for the stream of the last call")
        self.raise_recorded()

    def close(self, why: str) -> None:
        """Notify peers, and unmap their windows; the memory of results lives as long as they do. Local, idempotent.

        Waits for the work queued on the device.
        """
        if self._inherited:
            return
        self.notify_peers()
        self.broken = why
        self._peers.close()
        self.window.close()

    def notify_peers(self) -> None:
        """Notify the kernels of peers, after everything that this rank has sent, that it sends nothing more.

        Waits for the work queued on the device. Idempotent. A kernel that has given up has notified them already, with
        the reason.
        """
        if self._notified_peers or self.pinned.gave_up:
            return
        self._notified_peers = True
        word = torch.frombuffer(bytearray(struct.pack("<2I", self.rank, Fault.peer_closed)), dtype=torch.uint8)
        offset = CONTROL_BLOCK_OFFSETS["gave_up"] + word.numel() * self.rank
        with suppress(RuntimeError):  # the CUDA context is broken, or gone
            if self.device.type == "cuda" and self.num_ranks > 1:
                torch.cuda.synchronize(self.device)
            if self.pinned.gave_up:  # meanwhile
                return
            for rank, base in enumerate(self.window.bases):
                if rank != self.rank:
                    bytes_at(base + offset, word.numel(), self.device, self.window).copy_(word)

    def forget(self, why: str) -> None:
        """Leave the group alone, in a forked child, where nothing of CUDA works; see `tokenferry.forked`."""
        self._inherited = True
        self.broken = why
        self.pinned = Pinned(pin=False)  # a child cannot read the pinned memory of its parent
        self._peers.close()
        self.window.forget()

    # ------------------------------------------------------------------ kernels

    def new_template(self, spec: KernelSpec, packer: Packer, **config: int) -> LaunchTemplate:
        """Return a template with the common fields filled in; to be kept in ``templates`` once it is complete."""
        template = LaunchTemplate(self.jit.kernel(spec, **config), packer)
        params = template.params
        for rank, base in enumerate(self.window.bases):
            params.windows[rank] = base
        params.record = self.pinned.record_address
        params.timeout_ns = int(self.timeout_s * 1e9)
        params.rank = self.rank
        params.num_ranks = self.num_ranks
        return template

    def warmup(self) -> None:
        """Compile and load every kernel."""
        self.jit.warmup(SPECS)


class BreakingOff:
    """See `Context.breaking_off`. A class, since `contextlib.contextmanager` takes a microsecond.

    Args:
        context: The context of the group.
        handled: Errors that do not break it.
    """

    __slots__ = ("_context", "_handled")

    def __init__(self, context: Context, handled: tuple[type[BaseException], ...]) -> None:
        self._context, self._handled = context, handled

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, self._handled):  # an interrupt, too
            self._context.break_off(error)


def _late_stream(context: Context, call: Call, waited_s: float) -> PeerTimeout:
    """Break the group, because its own stream has not reached a call; return the error that says so."""
    phase, rank = call.signature.phase, context.flight_recorder.rank
    error = PeerTimeout(
        f"{phase} #{call.number}: rank {rank} waited {waited_s:.1f} s for its own stream, which has "
        "not reached this call; work that was queued before it does not end",
        phase=phase,
        call=call.number,
        rank=rank,
        peers=(rank,),
        waited_s=waited_s,
    )
    context.break_off(error)
    return error
