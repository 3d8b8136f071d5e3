"""Workspaces: memory of a CUDA group for rows that decode calls have under way.

kernels/device/decode.cuh says how it is used.

A workspace lies in the heap. It is made by the first decode call, and again by one that needs a larger one. All ranks
make theirs together and exchange the addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch

from tokenferry.backends.cuda.buffers import SymmetricAllocator
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.errors import ArgumentError, CapacityError, MismatchError
from tokenferry.kernels.decode_combine.spec import packets_of_chunk
from tokenferry.kernels.decode_dispatch.spec import message_words, notes
from tokenferry.kernels.decode_words import CHUNK_COLUMNS, ENCODING_SAME
from tokenferry.memory.heap import Block
from tokenferry.memory.tensor import bytes_at
from tokenferry.types import MoeShape

HALVES = 2
PACKET_BYTES = 16
_WORD_BYTES = 8
_LINE = 128

Exchange = Callable[[dict[str, Any]], list[dict[str, Any]]]
"""A function that sends a message to every rank, and returns every rank's; collective."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of each part of a workspace, for one half; all but the last are for one source rank.

    Attributes:
        words: Messages that give the number of rows for each expert, and the tokens.
        notes: Slots and weights of each row.
        rows: Rows of a dispatch, with their scales.
        answers: Rows of a combine, from all ranks.
    """

    words: int
    notes: int
    rows: int
    answers: int

    def within(self, other: Sizes) -> bool:
        """Return whether a workspace of ``other`` has space for this."""
        return all(mine <= theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True))

    def or_more(self, other: Sizes) -> Sizes:
        """Return sizes with space for both."""
        return Sizes(*map(max, zip(astuple(self), astuple(other), strict=True)))


def sizes_for(shape: MoeShape, num_ranks: int, item_bytes: int) -> Sizes:
    """Return the sizes that decode calls of a shape need, whatever their options; an element has ``item_bytes``."""
    M, K, H = shape.max_tokens, shape.top_k, shape.hidden
    num_local = shape.num_experts // num_ranks
    chunks = -(-H // CHUNK_COLUMNS)
    scales = chunks * PACKET_BYTES
    packets = packets_of_chunk(max(item_bytes, 2), ENCODING_SAME)
    return Sizes(
        words=_lines(message_words(M, num_local) * _WORD_BYTES),
        notes=_lines(M * notes(K) * PACKET_BYTES),
        rows=_lines(M * max(H * item_bytes, H + scales)),
        answers=_lines(M * max(K, num_ranks) * chunks * packets * PACKET_BYTES),
    )


def _lines(num_bytes: int) -> int:
    return -(-num_bytes // _LINE) * _LINE


class Workspace:
    """The workspace of one rank, and the addresses of those of its peers.

    Attributes:
        number: Index of this workspace in its group; a part of the keys of launch templates.
        sizes: Bytes of its parts.
        addresses: Address of the workspace of each rank, in this process.
        notes_at: Where the notes begin, from the workspace's start; the words are first.
        rows_at: Where the rows begin.
        answers_at: Where the answers begin.
    """

    def __init__(self, context: Context, sizes: Sizes, block: Block, number: int = 0) -> None:
        sources = HALVES * context.num_ranks
        self.number = number
        self.sizes = sizes
        self.addresses: tuple[int, ...] = ()
        self.notes_at = sources * sizes.words
        self.rows_at = self.notes_at + sources * sizes.notes
        self.answers_at = self.rows_at + sources * sizes.rows
        self.num_bytes = self.answers_at + HALVES * sizes.answers
        self.block = block
        with torch.inference_mode(False):  # else it could not be emptied outside of inference mode
            self._memory = bytes_at(block.address, self.num_bytes, context.device, block)

    def clear(self) -> None:
        """Reset everything to the state before the first call: no word or note has an epoch, no packet is under way."""
        self._memory[: self.rows_at].zero_()
        self._memory[self.rows_at :].fill_(0xFF)


def bytes_of(sizes: Sizes, num_ranks: int) -> int:
    """Return the bytes of a workspace."""
    return HALVES * (num_ranks * (sizes.words + sizes.notes + sizes.rows) + sizes.answers)


class Workspaces:
    """The workspaces of a rank, made when they are needed.

    Args:
        context: Context of this rank.
        allocator: Allocator of blocks of the heap.
        exchange: Collective function that exchanges the addresses.

    Attributes:
        now: The latest workspace, or None.
    """

    def __init__(self, context: Context, allocator: SymmetricAllocator, exchange: Exchange) -> None:
        self._context = context
        self._allocator = allocator
        self._exchange = exchange
        self._num_made = 0
        self._captured: list[Workspace] = []
        self._fits: dict[tuple[MoeShape, int], Workspace] = {}
        self.now: Workspace | None = None

    def fitting(self, call: Call, shape: MoeShape, item_bytes: int) -> Workspace:
        """Return a workspace with room for calls of a shape; collective if it has to be made.

        Raises:
            ArgumentError: a CUDA graph is being captured, and there is none yet.
            CapacityError: a rank's heap has no room.
            MismatchError: ranks made different calls.
            PeerTimeout: a rank did not answer in time.
        """
        workspace = self._fits.get((shape, item_bytes))
        if workspace is None:
            sizes, workspace = sizes_for(shape, self._context.num_ranks, item_bytes), self.now
            if workspace is None or not sizes.within(workspace.sizes):
                workspace = self._make(call, sizes if workspace is None else sizes.or_more(workspace.sizes))
                self._fits.clear()
            self._fits[shape, item_bytes] = workspace
        if call.capturing and workspace not in self._captured:
            self._captured.append(workspace)  # replays use it as long as the group lives
        return workspace

    def clear(self) -> None:
        """Clear all workspaces, those of CUDA graphs too; nothing may be under way."""
        for workspace in (*self._captured, *(() if self.now is None or self.now in self._captured else (self.now,))):
            workspace.clear()

    def _make(self, call: Call, sizes: Sizes) -> Workspace:
        context, phase = self._context, call.signature.phase
        if call.capturing:
            raise ArgumentError(
                f"{phase}: the first decode call of these sizes makes memory for rows under way, together with all "
                "ranks, which a CUDA graph cannot capture; call it once before the capture"
            )
        masked = sorted(context.masked_ranks())
        if masked:
            raise ArgumentError(
                f"{phase}: the first decode call of these sizes makes memory for rows under way, together with all "
                f"ranks, and rank(s) {masked} are masked; call it once before a rank is masked"
            )
        num_bytes, problem, block = bytes_of(sizes, context.num_ranks), "", None
        try:
            block = self._allocator.block(phase, num_bytes, call.stream)
        except CapacityError as error:
            problem = str(error)
        if block is not None:
            workspace = Workspace(context, sizes, block, self._num_made)
            self._num_made += 1
            workspace.clear()
            context.synchronize()  # before a peer writes to it
            if context.device.type == "cuda":
                torch.cuda.current_stream(context.device).synchronize()
        at = -1 if block is None else block.offset
        handshakes = self._exchange({"sizes": astuple(sizes), "at": at, "problem": problem, "call": phase})
        for rank, handshake in enumerate(handshakes):
            if handshake["call"] != phase or tuple(handshake["sizes"]) != astuple(sizes):
                mismatch = MismatchError(
                    f"{phase}: rank {context.rank} and rank {rank} made different calls: the first of these sizes, "
                    f"{astuple(sizes)} bytes here, is {handshake['call']} with {tuple(handshake['sizes'])} there; "
                    "call the same on all ranks, in the same order"
                )
                context.break_off(mismatch)
                raise mismatch
            if handshake["problem"]:
                raise CapacityError(f"{phase}: rank {rank}: {handshake['problem']}")
        assert block is not None
        workspace.addresses = tuple(
            base + handshake["at"] for base, handshake in zip(context.window.bases, handshakes, strict=True)
        )
        self.now = workspace
        return workspace
