"""Workspaces: memory of a CUDA group for rows that decode calls have under way.

kernels/device/decode.cuh says how it is used.

A workspace lies in the heap. It is made by the first decode call, and again by one that needs a larger one. The ranks
make theirs together: the kernel share_workspace exchanges the offsets. It leaves out masked ranks, and treats a rank
that is late as any decode kernel does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch

from tokenferry.backends.cuda import patience
from tokenferry.backends.cuda.buffers import SymmetricAllocator
from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate, call_packer
from tokenferry.backends.cuda.control import read_field, write_field
from tokenferry.errors import ArgumentError, CapacityError, RoutingError
from tokenferry.kernels.control_block import MAX_RANKS, OFFER_OFFSET_WORD, OFFER_WORDS, OFFSET_BYTES
from tokenferry.kernels.decode_combine.spec import packets_of_chunk
from tokenferry.kernels.decode_dispatch.spec import message_words, notes
from tokenferry.kernels.decode_words import CHUNK_COLUMNS, ENCODING_SAME
from tokenferry.kernels.share_workspace.spec import SPEC
from tokenferry.memory.heap import Block
from tokenferry.memory.tensor import bytes_at
from tokenferry.types import MoeShape

HALVES = 2
PACKET_BYTES = 16
_WORD_BYTES = 8
_LINE = 128
_OFFER = call_packer(SPEC, waits=True)
_WORD = struct.Struct("<2I")
"""The word ``workspace`` of a control block: members, number of the exchange."""


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


def sizes_for(shape: MoeShape, num_ranks: int, item_bytes: int, num_nodes: int = 1) -> Sizes:
    """Return the sizes that decode calls of a shape need, whatever their options.

    Args:
        shape: Experts of one node, and most tokens of a rank, those that it passes on included.
        num_ranks: Ranks of a node.
        item_bytes: Bytes of an element.
        num_nodes: Nodes from which tokens come.
    """
    M, K, H = shape.max_tokens, shape.top_k, shape.hidden
    num_local = shape.num_experts // num_ranks
    chunks = -(-H // CHUNK_COLUMNS)
    scales = chunks * PACKET_BYTES
    packets = packets_of_chunk(max(item_bytes, 2), ENCODING_SAME)
    return Sizes(
        words=_lines(message_words(M, num_local, num_nodes) * _WORD_BYTES),
        notes=_lines(M * notes(K, num_nodes) * PACKET_BYTES),
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
        addresses: Address of the workspace of each rank, in this process; 0 for ranks that are not members.
        members: A bit for each rank with which it was made.
        notes_at: Where the notes begin, from the workspace's start; the words are first.
        rows_at: Where the rows begin.
        answers_at: Where the answers begin.
    """

    def __init__(self, context: Context, sizes: Sizes, block: Block, number: int = 0) -> None:
        sources = HALVES * context.num_ranks
        self.number = number
        self.sizes = sizes
        self.addresses: tuple[int, ...] = ()
        self.members = 0
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


@dataclass(frozen=True, slots=True)
class _Shared:
    """What an exchange of workspaces has found.

    Attributes:
        number: Number of the exchange.
        offsets: Offset of the workspace of each rank that took part, in its window; 0: it has no room for one.
    """

    number: int
    offsets: dict[int, int]


class Workspaces:
    """The workspaces of a rank, made when they are needed.

    Args:
        context: Context of this rank.
        allocator: Allocator of blocks of the heap.
        num_nodes: Nodes from which tokens come.
        agree: Across nodes: called when a workspace is made, with whether all ranks of this node have room for it;
            exchanges that with the other nodes, and returns the nodes that have no room. None: there is one node.

    Attributes:
        now: The latest workspace, or None.
    """

    def __init__(
        self,
        context: Context,
        allocator: SymmetricAllocator,
        num_nodes: int = 1,
        agree: Callable[[Call, bool], list[int]] | None = None,
    ) -> None:
        self._context = context
        self._num_nodes = num_nodes
        self._agree = agree
        self._allocator = allocator
        self._num_made = 0
        self._captured: list[Workspace] = []
        self._left_behind: list[Workspace] = []
        self._fits: dict[tuple[MoeShape, int], Workspace] = {}
        self.now: Workspace | None = None

    @property
    def number(self) -> int:
        """`Workspace.number` of the latest one; -1 if there is none."""
        return -1 if self.now is None else self.now.number

    def fitting(self, call: Call, shape: MoeShape, item_bytes: int) -> Workspace:
        """Return a workspace with room for calls of a shape; collective if it has to be made.

        Raises:
            ArgumentError: a CUDA graph is being captured, and there is none yet; or a rank takes part again without
                which the workspace was made.
            CapacityError: a rank's heap has no room.
            MismatchError: ranks made different calls.
            PeerTimeout: a rank did not answer in time.
        """
        workspace = self._fits.get((shape, item_bytes))
        if workspace is None:
            sizes = sizes_for(shape, self._context.num_ranks, item_bytes, self._num_nodes)
            workspace = self.now
            if workspace is None or not sizes.within(workspace.sizes):
                workspace = self._make(call, sizes if workspace is None else sizes.or_more(workspace.sizes))
                self._fits.clear()
            self._fits[shape, item_bytes] = workspace
        if call.alive & ~workspace.members:
            first, strange = self._context.flight_recorder.first_rank, call.alive & ~workspace.members
            strangers = [first + rank for rank in range(self._context.num_ranks) if strange >> rank & 1]
            raise ArgumentError(
                f"{call.signature.phase}: rank(s) {strangers} were masked when the memory for rows under way was made, "
                "and have no part in it; let them come back as lost ranks do: between two barriers, every rank calls "
                "mask(rank, masked=False) for all ranks, its own number included"
            )
        if call.capturing and workspace not in self._captured:
            self._captured.append(workspace)  # replays use it as long as the group lives
        return workspace

    def meet(self, call: Call) -> None:
        """Wait until all ranks are here, as they are when they make a workspace; collective.

        Raises:
            ArgumentError: a CUDA graph is being captured.
            MismatchError: ranks made different calls.
            PeerTimeout: a rank did not answer in time.
        """
        if call.capturing:
            raise ArgumentError(f"{call.signature.phase}: not while a CUDA graph is captured; do it before")
        self._share(call, Sizes(0, 0, 0, 0), 0)

    def resynchronise(self, ranks: list[int]) -> None:
        """Clear all workspaces, those of CUDA graphs too; nothing may be under way.

        The latest one is dropped unless all of these ranks have made it together: ranks that were apart have made
        different ones, and the next call makes one anew. All ranks find the same, since what they read does not change
        meanwhile, but for those that have dropped theirs already.
        """
        window, bits = self._context.window, sum(1 << rank for rank in ranks)
        found = [_WORD.unpack(read_field(window, rank, "workspace", _WORD.size)) for rank in ranks]
        numbers = {number for _, number in found}
        together = len(numbers) == 1 and all(bits & ~members == 0 for members, _ in found)
        if not together:
            self._leave_behind()
            self._fits.clear()
            self.now = None
            write_field(window, "workspace", _WORD.pack(0, 0))
        masked = sum(1 << rank for rank in self._context.masked_ranks())
        self._left_behind = [workspace for workspace in self._left_behind if workspace.members & masked]
        for workspace in {id(one): one for one in (*self._captured, self.now) if one is not None}.values():
            workspace.clear()

    def close(self) -> None:
        """Give back the memory of all workspaces."""
        self.now = None
        self._captured.clear()
        self._left_behind.clear()
        self._fits.clear()

    def _make(self, call: Call, sizes: Sizes) -> Workspace:
        context, phase = self._context, call.signature.phase
        if call.capturing:
            raise ArgumentError(
                f"{phase}: the first decode call of these sizes makes memory for rows under way, together with all "
                "ranks, which a CUDA graph cannot capture; call it once before the capture"
            )
        num_bytes = bytes_of(sizes, context.num_ranks)
        workspace: Workspace | None = None
        full: CapacityError | None = None
        try:
            workspace = Workspace(context, sizes, self._allocator.block(phase, num_bytes, call.stream), self._num_made)
            self._num_made += 1
            workspace.clear()
        except CapacityError as error:
            full = error.with_traceback(None)  # the traceback would form a cycle with this frame
        shared = self._share(call, sizes, 0 if workspace is None else workspace.block.offset)
        first = context.flight_recorder.first_rank
        without = [first + rank for rank, offset in shared.offsets.items() if not offset]
        where, full_nodes = f"rank(s) {without}", list[int]()
        if self._agree is not None:
            with context.breaking_off():
                full_nodes = self._agree(call, not without)
        if full is not None:
            try:
                raise full
            finally:
                del full
        if full_nodes and not without:
            where = f"a rank on node(s) {full_nodes}"
        if without or full_nodes:
            raise CapacityError(
                f"{phase}: the heap of {where} has no room for the {num_bytes / 2**20:.1f} MiB of rows under way that "
                "calls of this size need; set TOKENFERRY_HEAP_MB higher, or release earlier results there"
            )
        assert workspace is not None
        bases = context.window.bases
        workspace.addresses = tuple(
            base + shared.offsets[rank] if rank in shared.offsets else 0 for rank, base in enumerate(bases)
        )
        workspace.members = sum(1 << rank for rank in shared.offsets)
        call.alive &= workspace.members
        write_field(context.window, "workspace", _WORD.pack(workspace.members, shared.number))
        self._leave_behind()
        self.now = workspace
        return workspace

    def _share(self, call: Call, sizes: Sizes, offset: int) -> _Shared:
        """Exchange offsets with all ranks that take part; late ones are masked, or break the group.

        Raises:
            MismatchError: a rank made another call.
            PeerTimeout: a rank did not answer in time.
        """
        context = self._context
        template = context.templates.get((SPEC,)) or self._template()
        template.pack(call.wait_ns, call.alive, call.number, call.signature.words)
        for i, num_bytes in enumerate(astuple(sizes)):
            template.params.sizes[i] = num_bytes // _LINE
        template.params.offset = offset // OFFSET_BYTES
        with context.breaking_off(RoutingError, CapacityError):  # these errors of earlier calls: nothing was offered
            template.launch(1, call.stream)
            context.synchronize()
        (number,) = struct.unpack("<I", read_field(context.window, context.rank, "shares", 4))
        (members,) = struct.unpack("<I", read_field(context.window, context.rank, "members", 4))
        words = struct.Struct(f"<{HALVES * MAX_RANKS * OFFER_WORDS}Q")
        offers = words.unpack(read_field(context.window, context.rank, "offers", words.size))
        first = (number % HALVES * MAX_RANKS) * OFFER_WORDS + OFFER_OFFSET_WORD
        return _Shared(
            number,
            {
                rank: (offers[first + rank * OFFER_WORDS] & 0xFFFFFFFF) * OFFSET_BYTES
                for rank in range(context.num_ranks)
                if members >> rank & 1
            },
        )

    def _template(self) -> LaunchTemplate:
        context = self._context
        template = context.templates[SPEC,] = context.new_template(SPEC, _OFFER)
        template.params.masked_out = context.pinned.masked_address
        template.params.mask_late = int(context.mask_late)
        if context.mask_late and self._num_nodes > 1:
            template.params.timeout_ns = int(patience.MEMORY * template.params.timeout_ns)
        template.block = 32 * context.num_ranks
        return template

    def _leave_behind(self) -> None:
        """Keep the workspace that will be replaced if masked ranks know it: they may still be sending to it."""
        masked = sum(1 << rank for rank in self._context.masked_ranks())
        if self.now is not None and self.now.members & masked:
            self._left_behind.append(self.now)
