"""Whom the decode calls of a CUDA group leave out, and how a rank that was left out comes back.

A rank is masked in three places: the host's set (`Context.masked`), which calls to come start from; a word of pinned
memory, where a kernel notes whom it has waited for in vain; and the word ``masked`` of the control block, which
every kernel reads when it starts, those of a CUDA graph too.

Decode calls carry epochs, which each rank counts by itself. Who was away has counted fewer, or others, and rows that
were sent to or by it may lie half taken in workspaces. So all ranks resynchronise together, while nothing is under
way: each takes the latest epoch of all boards as its own, says that it has received everything up to there, and
    empties its
workspace.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from tokenferry.backends.cuda.context import Context
from tokenferry.backends.cuda.decode import Decoder
from tokenferry.kernels.control_block import CONTROL_BLOCK_OFFSETS, MAX_RANKS
from tokenferry.memory.tensor import bytes_at

_CHANNELS = 2
_EPOCHS = 1 << 32


class Masks:
    """The masks of one rank.

    Args:
        context: This rank's.
        decoder: Its decode calls.
    """

    def __init__(self, context: Context, decoder: Decoder) -> None:
        self._context = context
        self._decoder = decoder
        self._last_step = -1

    def add(self, rank: int) -> None:
        """Leave a rank out of the calls that follow on this rank's stream, and of CUDA graphs that run from now on.

        Raises:
            ArgumentError: a CUDA graph is being captured.
        """
        self._context.order_after_calls_outside_graphs("mask")
        self._decoder.receive_open()
        self._context.masked.add(rank)
        self._publish_mask()

    def remove(self, rank: int) -> None:
        """Stop leaving a rank out; come into step if it was lost, or is this one.

        Raises:
            ArgumentError: a CUDA graph is being captured.
            TokenferryError: what a kernel has found since.
        """
        context = self._context
        context.order_after_calls_outside_graphs("mask")
        if rank != context.rank and rank not in context.absent():
            return
        # Whoever comes back after this rank did, but before its next call, was away, too.
        if context.unmask(rank) or rank == context.rank or self._last_step == context.number:
            self._last_step = context.number
            self._resynchronise()
        self._publish_mask()

    def _publish_mask(self) -> None:
        bits = sum(1 << rank for rank in self._context.absent())
        self._write("masked", struct.pack("<I", bits))

    def _resynchronise(self) -> None:
        """Take over the latest epochs, and forget what was under way; see `ExpertGroup.mask` for what has to hold."""
        context = self._context
        context.synchronize()
        self._settle()
        call = [rank for rank in range(context.num_ranks) if rank not in context.absent()]
        boards = [struct.unpack("<2I", self._read(rank, "sends", 8)) for rank in call]
        latest = [_latest([epochs[channel] for epochs in boards]) for channel in range(_CHANNELS)]
        halves = [_by_half(epoch) for epoch in latest]
        self._write("sends", struct.pack("<2I", *latest))
        self._write("received", b"".join(halves))
        self._write("acks", b"".join(half * MAX_RANKS for half in halves))
        self._decoder.forget()
        self._settle()

    def _settle(self) -> None:
        """Wait until all work on the device is done, CUDA graphs included."""
        if self._context.device.type == "cuda":
            torch.cuda.synchronize(self._context.device)

    def _read(self, rank: int, field: str, num_bytes: int) -> bytes:
        return bytes(self._field(rank, field, num_bytes).tolist())

    def _write(self, field: str, value: bytes) -> None:
        self._field(self._context.rank, field, len(value)).copy_(torch.frombuffer(bytearray(value), dtype=torch.uint8))

    def _field(self, rank: int, field: str, num_bytes: int) -> Tensor:
        window = self._context.window
        return bytes_at(window.bases[rank] + CONTROL_BLOCK_OFFSETS[field], num_bytes, window.device, window)


def _latest(epochs: list[int]) -> int:
    """The one that comes last; they wrap around."""
    latest = epochs[0]
    for epoch in epochs:
        if 0 < (epoch - latest) % _EPOCHS < _EPOCHS // 2:
            latest = epoch
    return latest


def _by_half(epoch: int) -> bytes:
    """What a rank says that has received every send up to ``epoch``: the last even one, then the last odd one."""
    before = max(epoch - 1, 0)
    return struct.pack("<2I", *((before, epoch) if epoch % 2 else (epoch, before)))
