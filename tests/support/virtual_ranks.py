"""R virtual ranks on one GPU: R windows in one process, and for each a record and a stream. Kernels run alone.

A launch starts one kernel on all ranks, each on its own stream, with grids so small that all blocks are resident
together; `Ranks.wait` waits for it. So no kernel that waits for its peers is queued before one that they wait for.

Without a GPU, the emulator runs the kernels on the CPU; memory "on the GPU" is then ordinary memory.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from support.emulator import Emulator
from tokenferry.jit.driver import Device
from tokenferry.jit.kernel import Jit, KernelSpec
from tokenferry.kernels.all import ACROSS_NODES, SPECS
from tokenferry.kernels.control_block import (
    CONTROL_BLOCK_BYTES,
    CONTROL_BLOCK_OFFSETS,
    ENDED_WORD,
    FIRST_OFFSET,
    OFFSET_BYTES,
    RECORD_WORDS,
    Fault,
)
from tokenferry.memory.tensor import bytes_at
from tokenferry.memory.window import Window, share_in_process

HEAP_BYTES = 32 << 20
POISON = 0xA5
GUARD = 512
"""Bytes before and behind each block that must not be written."""
MILLISECOND = 1_500_000
"""Cycles, roughly."""

Fields = Mapping[str, Any]


class Gpu:
    """A GPU as virtual ranks use it; ``Emulator`` has the same methods."""

    device = torch.device("cuda", 0)
    timeout_s = 5.0

    def windows(self, num_ranks: int, num_bytes: int) -> list[Window]:
        return share_in_process(num_ranks, self.device, num_bytes)

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def sleep(self, stream: torch.cuda.Stream, milliseconds: float) -> None:
        """Enqueue a kernel that does nothing for a while."""
        with torch.cuda.stream(stream):
            torch.cuda._sleep(int(milliseconds * MILLISECOND))

    @functools.cached_property
    def smem_bytes(self) -> int:
        """Return the shared memory that a block may have."""
        return Device(0).smem_bytes()

    def pinned(self, tensor: Tensor) -> Tensor:
        """Return a copy in memory of the host that kernels can write."""
        return tensor.pin_memory()

    def settle(self) -> None:
        """Wait for the work of torch."""
        torch.cuda.current_stream(self.device).synchronize()

    @functools.cached_property
    def jit(self) -> Jit:
        """All kernels, loaded: a driver that loads one later might wait for running kernels."""
        made = Jit(0, None)
        made.warmup((*SPECS, *ACROSS_NODES))
        return made


MACHINE = Gpu() if torch.cuda.is_available() else Emulator()
TIMEOUT_S = float(os.environ.get("VIRTUAL_TIMEOUT_S", MACHINE.timeout_s))
"""Deadline of the kernels; a sanitizer needs more."""


def dynamic_bytes(spec: KernelSpec) -> int:
    """Return the dynamic shared memory that a block of a kernel may have."""
    return MACHINE.smem_bytes - spec.static_smem


class Record(NamedTuple):
    """A fault that a kernel found; kernels/control_block.py documents the words."""

    code: int
    call: int
    peer: int
    word: int
    seen: int
    expected: int
    blamed: int
    waited_ms: int


class Block:
    """Poisoned bytes in the heap of one rank's window, with guards around them.

    Attributes:
        handshake: Where it begins, as an offset in a handshake.
        address: Where it begins, as an address.
        tensor: uint8 ``[num_bytes]``.
    """

    def __init__(self, ranks: Ranks, rank: int, start: int, num_bytes: int) -> None:
        window = ranks.windows[rank]
        self.handshake = (start + GUARD) // OFFSET_BYTES
        self.address = window.base + start + GUARD
        self._whole = bytes_at(window.base + start, num_bytes + 2 * GUARD, window.device, window)
        self._whole.fill_(POISON)
        self.tensor = self._whole[GUARD : GUARD + num_bytes]

    def cpu(self) -> Tensor:
        """Return the bytes, on the CPU; fail if the guards were written."""
        whole = self._whole.cpu()
        wrong = torch.cat([whole[:GUARD], whole[whole.numel() - GUARD :]]) != POISON
        assert not bool(wrong.any()), f"{int(wrong.sum())} bytes around a block of {self.tensor.numel()} were written"
        return whole[GUARD : whole.numel() - GUARD]


class Ranks:
    """R virtual ranks.

    Args:
        num_ranks: R.
        heap_bytes: Bytes of the heap of each window.
    """

    def __init__(self, num_ranks: int, heap_bytes: int = HEAP_BYTES) -> None:
        self.num_ranks = num_ranks
        self.device = MACHINE.device
        self._kernels = MACHINE.jit  # all are compiled before any rank is kept waiting
        self.windows = MACHINE.windows(num_ranks, CONTROL_BLOCK_BYTES + heap_bytes)
        self.streams = [MACHINE.stream() for _ in range(num_ranks)]
        self.records = self.pinned(torch.zeros(num_ranks, RECORD_WORDS, dtype=torch.int32))
        self.call = 0
        self._next = [0] * num_ranks
        self._kept: list[Tensor] = []
        self.reset()
        # torch loads its kernels now, not while ranks wait for each other: that would wait for theirs.
        self.delay(0, 0)
        for rank in range(num_ranks):
            self.words(rank, "stopped").zero_()
        self.wait()

    # ------------------------------------------------------------------ memory

    def reset(self) -> None:
        """Free all blocks. Ranks start at different offsets, so that offsets of another rank are wrong."""
        self._next = [CONTROL_BLOCK_BYTES + 4096 * rank for rank in range(self.num_ranks)]

    def block(self, rank: int, num_bytes: int) -> Block:
        """Return poisoned bytes in a window."""
        start = self._next[rank]
        self._next[rank] = -(-(start + num_bytes + 2 * GUARD) // 128) * 128
        assert self._next[rank] <= self.windows[rank].num_bytes, "the heap of the test is too small"
        return Block(self, rank, start, num_bytes)

    def on_device(self, tensor: Tensor) -> Tensor:
        """Return a copy on the GPU, with the same strides."""
        there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
        return there.copy_(tensor)

    def poisoned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return a tensor on the GPU of which every byte is poison."""
        made = torch.empty(*shape, dtype=dtype, device=self.device)
        made.view(torch.uint8).fill_(POISON)
        return made

    @functools.cached_property
    def smem_bytes(self) -> int:
        """Return the shared memory that a block may have."""
        return Device(0).smem_bytes()

    def pinned(self, tensor: Tensor) -> Tensor:
        """Return a copy in memory of the host that kernels can write."""
        return MACHINE.pinned(tensor)

    def words(self, rank: int, field: str, count: int = 1, dtype: torch.dtype = torch.int32, first: int = 0) -> Tensor:
        """Return words of a field of a rank's control block, to read and write while no kernel runs."""
        window = self.windows[rank]
        at = window.base + CONTROL_BLOCK_OFFSETS[field] + first * dtype.itemsize
        return bytes_at(at, count * dtype.itemsize, window.device, window).view(dtype)

    def epochs(self) -> list[int]:
        """Return the epoch of each rank's last collective kernel that ended."""
        return [int(self.words(rank, "epoch")) for rank in range(self.num_ranks)]

    def failed(self) -> list[int]:
        """Return the fault for which each rank gave up, or 0."""
        return [int(self.words(rank, "failed")) for rank in range(self.num_ranks)]

    # ------------------------------------------------------------------ kernels

    def delay(self, rank: int, milliseconds: float) -> None:
        """Keep the stream of a rank busy for a while."""
        MACHINE.sleep(self.streams[rank], milliseconds)

    def launch(
        self,
        spec: KernelSpec,
        fields: Sequence[Fields | None],
        sizes: tuple[int, int, int],
        config: Mapping[str, int] | None = None,
    ) -> None:
        """Launch a kernel on every rank that has fields; returns at once.

        Args:
            spec: The kernel.
            fields: One mapping a rank: the values of the params; tensors stand for their addresses, ``handshake`` is a
                mapping of words, ``alive`` the ranks that take part, ``timeout_s`` another deadline. None: no
                launch.
            sizes: Blocks, threads a block, dynamic shared memory.
            config: Config of the kernel.
        """
        kernel = self._kernels.kernel(spec, **(config or {}))
        ready = [None if one is None else self._fill(kernel.new_params(), rank, one) for rank, one in enumerate(fields)]
        MACHINE.settle()  # the work of the test itself is done
        for rank, params in enumerate(ready):
            if params is not None:
                kernel.launch(params, *sizes, self.streams[rank].cuda_stream)

    def run(
        self,
        spec: KernelSpec,
        fields: Sequence[Fields | None],
        sizes: tuple[int, int, int],
        config: Mapping[str, int] | None = None,
    ) -> None:
        """Launch, wait, and fail if any rank recorded a fault."""
        self.call += 1
        self.launch(spec, fields, sizes, config)
        self.wait()
        self.check_quiet()

    def wait(self, *ranks: int) -> None:
        """Wait for some ranks, or all. A kernel that does not end stops the whole run of tests, with a message."""
        deadline = time.monotonic() + 4 * TIMEOUT_S + 10
        for rank in ranks or range(self.num_ranks):
            while not self.streams[rank].query():
                if time.monotonic() > deadline:
                    pytest.exit(f"virtual rank {rank} of {self.num_ranks}: its kernel does not end", returncode=3)
                time.sleep(1e-4)
        if not ranks:
            self._kept.clear()

    def record(self, rank: int) -> Record | None:
        """Return the record of a rank and clear it, as a host does that raises it."""
        words = [word & 0xFFFFFFFF for word in self.records[rank].tolist()]
        self.records[rank].zero_()
        if words[0] in (Fault.bad_routing, Fault.too_many_nodes, Fault.overflow):
            self.words(rank, "stopped").zero_()
        return Record(*words[:ENDED_WORD]) if words[0] else None

    def check_quiet(self) -> None:
        """Check that no rank recorded a fault."""
        records = [self.record(rank) for rank in range(self.num_ranks)]
        assert records == [None] * self.num_ranks, records

    def _fill(self, params: Any, rank: int, fields: Fields) -> Any:
        for peer, base in enumerate(self.windows[rank].bases):
            params.windows[peer] = base
        values = {"alive": (1 << self.num_ranks) - 1, "call_number": self.call, **fields}
        params.timeout_ns = int(values.pop("timeout_s", TIMEOUT_S) * 1e9)
        params.record = self.records[rank].data_ptr()
        params.rank, params.num_ranks = rank, self.num_ranks
        for word, value in values.pop("handshake", {}).items():
            params.handshake[word] = value
        for name, value in values.items():
            if isinstance(value, Tensor):
                self._kept.append(value)
                value = value.data_ptr() if value.numel() else 0
            setattr(params, name, value)
        return params


_ranks: dict[int, Ranks] = {}


def ranks_of(num_ranks: int) -> Ranks:
    """Return R virtual ranks, the same from test to test, as in a group from call to call; new ones after a failure."""
    found = _ranks.get(num_ranks)
    if found is None or any(found.failed()) or len(set(found.epochs())) > 1 or bool(found.records.any()):
        found = _ranks[num_ranks] = Ranks(num_ranks)
    found.reset()
    return found


def offsets(*blocks: Block | None) -> dict[int, int]:
    """Return the words of a handshake with the offsets of blocks."""
    return {FIRST_OFFSET + i: block.handshake for i, block in enumerate(blocks) if block is not None}


def same_bytes(what: str, got: Tensor, want: Tensor, row_bytes: int) -> None:
    """Assert that bytes are equal; the message gives the first row that differs, and whether it was written at all."""
    assert got.shape == want.shape, f"{what}: got {got.numel()} bytes, want {want.numel()}"
    if torch.equal(got, want):
        return
    place = int((got != want).nonzero()[0])
    row, byte = divmod(place, row_bytes)
    wrong = torch.unique((got != want).nonzero() // row_bytes).tolist()
    raise AssertionError(
        f"{what}: {len(wrong)} rows of {-(-got.numel() // row_bytes)} are wrong: {wrong[:20]}; the first at row {row}, "
        f"byte {byte}: got {int(got[place])}, want {int(want[place])} ({POISON} is poison)"
    )
