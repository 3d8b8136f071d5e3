"""What all calls of a CUDA group share: window, heap, kernels, the order of calls, and what broke the group."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tokenferry.backends.cuda.faults import SIGNATURE_BYTES, FlightRecorder, Pinned, Signature
from tokenferry.backends.cuda.runtime import Runtime
from tokenferry.errors import ArgumentError, CapacityError, ClosedError, PeerTimeout, RoutingError
from tokenferry.jit.driver import check
from tokenferry.jit.kernel import Kernel, KernelSpec
from tokenferry.kernels.all import SPECS
from tokenferry.kernels.control_block import (
    CONTROL_BLOCK_BYTES,
    CONTROL_BLOCK_OFFSETS,
    FIRST_OFFSET,
    HANDSHAKE_WORDS,
    MAX_RANKS,
)
from tokenferry.memory.tensor import bytes_at
from tokenferry.memory.window import Window

_MAX_TEMPLATES = 512
_HARMLESS = (RoutingError, CapacityError)
"""What does not put ranks out of step: the device found it before anything was sent, or all ranks found it together."""
_NONE_MASKED = memoryview(bytes(4 * MAX_RANKS)).cast("I")
_CALL = struct.Struct("<II")
"""``alive`` and ``call`` of params, which lie side by side."""


@dataclass(slots=True)
class Call:
    """One call at work.

    Attributes:
        number: Of the call on its group.
        stream: Where it runs.
        capturing: Whether a CUDA graph captures it.
        alive: A bit for each rank that takes part.
        signature: What it announces.
        wait_ns: Address of ``[R]`` int64 to which kernels add the nanoseconds waited for each rank, or 0.
    """

    number: int
    stream: int
    capturing: bool
    alive: int
    signature: Signature
    wait_ns: int


class LaunchTemplate:
    """A kernel, and params in which all that follows from one geometry is filled in.

    Attributes:
        params: The struct.
        view: Its bytes.
        first: Where the fields behind the common ones begin.
        offsets: Where the handshake's offsets begin.
        block: Threads of a block.
        smem_bytes: Dynamic shared memory of a block.
        signature: What the handshake says now.
        wait_ns: What the field of this name holds now.
    """

    __slots__ = (
        "alive",
        "block",
        "first",
        "handshake",
        "kernel",
        "offsets",
        "params",
        "signature",
        "smem_bytes",
        "view",
        "wait_ns",
    )

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.params: Any = kernel.new_params()
        kind = type(self.params)
        self.view = memoryview(self.params).cast("B")
        self.alive: int = kind.alive.offset
        self.handshake: int = kind.handshake.offset
        self.offsets = self.handshake + 4 * FIRST_OFFSET
        self.first = self.handshake + 4 * HANDSHAKE_WORDS
        self.block = 32
        self.smem_bytes = 0
        self.signature: Signature | None = None
        self.wait_ns = 0

    def launch(self, grid: int, stream: int) -> None:
        """Enqueue it."""
        self.kernel.launch(self.params, grid, self.block, self.smem_bytes, stream)


class Context:
    """One rank's place in a CUDA group. One thread at a time.

    Args:
        window: Shared by all ranks; the control block at its start is zero.
        runtime: Kernels and streams of the device.
        timeout_s: Seconds that each wait may take.
        mask_late: Whether decode calls mask a late rank and go on.
    """

    def __init__(self, window: Window, runtime: Runtime, timeout_s: float, *, mask_late: bool = False) -> None:
        self.window = window
        self.rank = window.rank
        self.num_ranks = window.num_ranks
        self.device = window.device
        self.timeout_s = timeout_s
        self.mask_late = mask_late
        self.jit = runtime.jit
        self.heap = window.heap(CONTROL_BLOCK_BYTES)
        self.pinned = Pinned(pin=window.device.type == "cuda")
        self.flight_recorder = FlightRecorder(self.rank)
        self.masked: set[int] = set()
        self.broken: str | None = None
        self.num_sms = runtime.num_sms
        self.templates: dict[tuple[Any, ...], LaunchTemplate] = {}
        self._driver = runtime.driver
        self._streams = runtime.streams
        self._everybody = (1 << self.num_ranks) - 1
        self._number = 0
        self._last: dict[int, int] = {}  # by capture, 0 if none: the stream of the last call

    # ------------------------------------------------------------------ one call

    def begin(self, signature: Signature, *, tolerant: bool = False, wait_ns: int = 0) -> Call:
        """Number a call, raise what earlier ones met, and put it behind them on the device.

        Args:
            signature: What has to be the same on all ranks.
            tolerant: Whether ranks that are masked are left out.
            wait_ns: See `Call`.

        Raises:
            ClosedError: the group was closed or is broken.
            TokenferryError: what a kernel has found since.
        """
        stream, capture = self._join(signature.phase)
        number = self._number = self._number % 0xFFFFFFFF + 1
        self.flight_recorder.note(number, signature)
        alive = self._everybody
        if tolerant:
            alive &= ~sum(1 << rank for rank in self.absent())
        return Call(number, stream, capture != 0, alive, signature, wait_ns)

    def resume(self, call: Call) -> Call:
        """Go on with a call on the current stream, behind what came before; as `begin`, without a new number.

        Raises:
            ClosedError: the group was closed or is broken.
            TokenferryError: what a kernel has found since.
        """
        stream, capture = self._join(call.signature.phase)
        return Call(call.number, stream, capture != 0, call.alive, call.signature, call.wait_ns)

    def absent(self) -> frozenset[int]:
        """Ranks that decode calls leave out: by hand, or since a kernel waited for one in vain."""
        if self.mask_late and self.pinned.masked != _NONE_MASKED:
            self.masked.update(rank for rank in range(self.num_ranks) if self.pinned.masked[rank])
        return frozenset(self.masked)

    @property
    def number(self) -> int:
        """Of the last call."""
        return self._number

    def unmask(self, rank: int) -> bool:
        """Stop leaving a rank out; returns whether a kernel had waited for it in vain."""
        lost = self.pinned.masked[rank] != 0
        self.pinned.masked[rank] = 0
        self.masked.discard(rank)
        return lost

    def order_after_calls_outside_graphs(self, what: str) -> None:
        """Put the current stream behind all calls, for work that is no call.

        Raises:
            ArgumentError: a CUDA graph is being captured.
        """
        if self._streams.capture(self._streams.current()):
            raise ArgumentError(f"{what}: not while a CUDA graph is captured; do it before or afterwards")
        self.order_after_calls()

    def order_after_calls(self) -> tuple[int, int]:
        """Put the current stream behind all calls; raises nothing that they met.

        A call in a CUDA graph and one outside are not ordered here: when a graph runs, its user says.

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

    def _join(self, phase: str) -> tuple[int, int]:
        """Raise what earlier calls met, and put the current stream behind them; returns it and its capture, or 0."""
        if self.broken:
            raise ClosedError(f"{phase}: the group {self.broken}; make a new ExpertGroup")
        stream, capture = self.order_after_calls()
        if self.pinned.faulty and not capture:  # a call that is captured runs later, if at all
            self.raise_fault()
        return stream, capture

    def raise_fault(self) -> None:
        """Raise what the record says; does nothing if it says nothing.

        Raises:
            TokenferryError: what a kernel has found.
        """
        if not self.pinned.faulty:
            return
        error = self.flight_recorder.explain(self.pinned.take_record())
        if isinstance(error, _HARMLESS):
            self._go_on()
        else:
            self.break_off(error)
        raise error

    def _go_on(self) -> None:
        """Let calls from now on run again: those behind one that came to nothing come to nothing, too."""
        self.order_after_calls()
        stopped = self.window.base + CONTROL_BLOCK_OFFSETS["stopped"]
        bytes_at(stopped, 4, self.device, self.window).zero_()  # in the order of the stream: behind all of them

    @contextmanager
    def breaking_off(self, *harmless: type[BaseException]) -> Iterator[None]:
        """Something that peers wait for: if it ends early, by an interrupt, too, the group is at an end."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, harmless):
                self.break_off(error)
            raise

    def break_off(self, error: BaseException) -> None:
        """The group is at an end: its ranks may be out of step."""
        self.broken = f"is broken by an earlier {type(error).__name__}: {error}"

    def wait_for_counts(self, call: Call) -> None:
        """Wait until the host words of a dispatch are here; other threads run meanwhile.

        Raises:
            TokenferryError: what a kernel has found.
        """
        # A kernel ahead may take two deadlines before it says for whom it waited (kernels/push); then comes this one.
        waited_s = 3 * self.timeout_s
        if not self.pinned.wait_for_call_number(call.number, waited_s):
            phase = call.signature.phase
            error = PeerTimeout(
                f"{phase} #{call.number}: rank {self.rank} waited {waited_s:.1f} s for its own stream, which has "
                "not come to this call; work that was queued before it does not end",
                phase=phase,
                call=call.number,
                rank=self.rank,
                peers=(self.rank,),
                waited_s=waited_s,
            )
            self.break_off(error)
            raise error
        self.raise_fault()

    def synchronize(self) -> None:
        """Wait for all work of this rank's calls, and raise what they met."""
        if 0 in self._last:
            with self._driver.current():  # a handle of 0 is the default stream of whatever device is current
                check(self._driver.cuda.cuStreamSynchronize(self._last[0]), "waiting for the stream of the last call")
        self.raise_fault()

    def close(self, why: str) -> None:
        """Unmap the peers; memory of results lives as long as they do. Local, idempotent."""
        self.broken = why
        self.window.close()

    # ------------------------------------------------------------------ kernels

    def new_template(self, key: tuple[Any, ...], spec: KernelSpec, **config: int) -> LaunchTemplate:
        """Params for a new geometry, kept under ``key`` in ``templates``, with all that never changes filled in."""
        template = LaunchTemplate(self.jit.kernel(spec, **config))
        params = template.params
        for rank, base in enumerate(self.window.bases):
            params.windows[rank] = base
        params.record = self.pinned.record_address
        params.timeout_ns = int(self.timeout_s * 1e9)
        params.rank = self.rank
        params.num_ranks = self.num_ranks
        if len(self.templates) >= _MAX_TEMPLATES:
            self.templates.clear()
        self.templates[key] = template
        return template

    def address(self, template: LaunchTemplate, call: Call) -> None:
        """Fill in what belongs to the call: its number, who takes part, and the signature in the handshake."""
        view, signature = template.view, call.signature
        _CALL.pack_into(view, template.alive, call.alive, call.number)
        if template.signature is not signature:
            template.signature = signature
            view[template.handshake : template.handshake + SIGNATURE_BYTES] = signature.words
        if template.wait_ns != call.wait_ns:
            template.wait_ns = template.params.wait_ns = call.wait_ns

    def warmup(self) -> None:
        """Compile and load every kernel."""
        self.jit.warmup(SPECS)
