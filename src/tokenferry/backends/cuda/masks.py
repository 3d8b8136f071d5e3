"""Masks of a CUDA group: which ranks decode calls skip, and how a rank that was skipped takes part again.

A rank is masked in three places: in the set of the host (`Context.masked_ranks`), from which calls start; in a word of
pinned memory, which a kernel sets when its wait for the rank times out; and in the word ``masked`` of the control
block, which every kernel reads when it starts, those of CUDA graphs too.

Decode calls carry epochs, which each rank counts for itself. A rank that was masked may have counted differently, and
rows that were sent to it or by it may lie half received in workspaces. So all ranks resynchronise together, while
nothing is under way: each adopts the latest epoch of all control blocks, marks everything up to there as received, and
clears its workspace, or drops it if these ranks have not made it together.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from tokenferry.backends.cuda.context import Context
from tokenferry.backends.cuda.control import read_field, write_field
from tokenferry.backends.cuda.decode import Decoding
from tokenferry.kernels.control_block import CONTROL_BLOCK_OFFSETS, MAX_RANKS
from tokenferry.memory.tensor import tensor_at

_CHANNELS = 2
_EPOCHS = 1 << 32


class Masks:
    """The masks of one rank.

    Args:
        context: Context of this rank.
        decoder: Decode calls of this rank.
    """

    def __init__(self, context: Context, decoder: Decoding) -> None:
        self._context = context
        self._decoder = decoder
        self._rank = context.rank
        self._resynchronised_at = -1

    def ranks(self) -> frozenset[int]:
        """Return the ranks that decode calls skip."""
        return self._context.masked_ranks()

    def add(self, rank: int) -> None:
        """Skip a rank in the calls that follow on this rank's stream, and in CUDA graphs that run from now on.

        Raises:
            ArgumentError: a CUDA graph is being captured.
        """
        self._context.order_after_calls_outside_graphs("mask")
        self._decoder.receive_open()
        self._mask(rank)
        self._publish_mask()

    def remove(self, rank: int) -> None:
        """Stop skipping a rank; resynchronise if it was lost, or is this one.

        Raises:
            ArgumentError: a CUDA graph is being captured.
            TokenferryError: the error of an earlier call, found by a kernel.
        """
        context = self._context
        context.order_after_calls_outside_graphs("mask")
        if rank != self._rank and rank not in self.ranks():
            return
        # A rank that is unmasked after this one was, but before this one's next call, was lost, too.
        if self._unmask(rank) or rank == self._rank or self._resynchronised_at == context.latest_call:
            self._resynchronised_at = context.latest_call
            self._resynchronise()
        self._publish_mask()

    def write(self, out: Tensor) -> None:
        """Set ``out`` ``[R]`` int32 to 1 for each masked rank and 0 for the others, behind all calls so far."""
        context = self._context
        context.order_after_calls()
        word = tensor_at(
            context.window.base + CONTROL_BLOCK_OFFSETS["masked"], (1,), torch.int32, context.device, context.window
        )
        bits = torch.arange(context.num_ranks, dtype=torch.int32, device=context.device)
        out.copy_(torch.bitwise_right_shift(word, bits) & 1)

    def _mask(self, rank: int) -> None:
        self._context.mask(rank)

    def _unmask(self, rank: int) -> bool:
        """Return whether a kernel had masked the rank."""
        return self._context.unmask(rank)

    def _publish_mask(self) -> None:
        bits = sum(1 << rank for rank in self._context.masked_ranks())
        write_field(self._context.window, "masked", struct.pack("<I", bits))

    def _resynchronise(self) -> None:
        """Adopt the latest epochs of all ranks, and drop what was under way; see `ExpertGroup.mask`."""
        context, window = self._context, self._context.window
        context.synchronize()
        self._wait_for_device()
        ranks = [rank for rank in range(context.num_ranks) if rank not in context.masked_ranks()]
        sends = [struct.unpack("<2I", read_field(window, rank, "sends", 8)) for rank in ranks]
        shares = [struct.unpack("<I", read_field(window, rank, "shares", 4))[0] for rank in ranks]
        latest = [_latest([epochs[channel] for epochs in sends]) for channel in range(_CHANNELS)]
        halves = [_by_half(epoch) for epoch in latest]
        write_field(window, "sends", struct.pack("<2I", *latest))
        write_field(window, "received", b"".join(halves))
        write_field(window, "acks", b"".join(half * MAX_RANKS for half in halves))
        write_field(window, "shares", struct.pack("<I", _latest(shares)))
        self._decoder.resynchronise(ranks)
        self._wait_for_device()

    def _wait_for_device(self) -> None:
        """Wait until all work on the device is done, CUDA graphs included."""
        if self._context.device.type == "cuda":
            torch.cuda.synchronize(self._context.device)


def _latest(epochs: list[int]) -> int:
    """Return the latest of several epochs, which wrap around."""
    latest = epochs[0]
    for epoch in epochs:
        if 0 < (epoch - latest) % _EPOCHS < _EPOCHS // 2:
            latest = epoch
    return latest


def _by_half(epoch: int) -> bytes:
    """Return the words of a rank that has received every send up to ``epoch``: the last even one, the last odd one."""
    before = max(epoch - 1, 0)
    return struct.pack("<2I", *((before, epoch) if epoch % 2 else (epoch, before)))
