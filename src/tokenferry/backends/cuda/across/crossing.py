"""What crosses between nodes in a call: counts, routing, rows and sums, each to and from the ranks of a rail."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tokenferry.backends.cuda.across.comparer import Comparer, HeaderAddresses
from tokenferry.backends.cuda.across.contents import HEADER_BYTES, STATE_BYTES, CrossingRouting, Opening, Words
from tokenferry.backends.cuda.across.launch import check_template, clock_template, open_template
from tokenferry.backends.cuda.across.parcels import Chunks, Expected, Step, Swap
from tokenferry.backends.cuda.across.rails import Part, Rails, Transfer
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.buffers import section_ends
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.signature import Signature
from tokenferry.kernels.control_block import CONTROL_BLOCK_OFFSETS, RAIL_WORDS, ROWS_WORD, SIGNATURE_WORDS
from tokenferry.memory.tensor import tensor_at
from tokenferry.topology import Topology

Transfers = dict[tuple[int, int], Transfer]
"""Exchanges of chunks, by the node from which one comes, and its number."""

_MAX_CHUNKS = 256


class Crossing:
    """The exchanges of one rank with its rail peers.

    Args:
        context: Context of this rank.
        topology: The nodes.
        rails: What carries the exchanges.
        expected: The expected traffic, by which rows are cut into chunks.

    Attributes:
        own_state: Address of the state that this rank sends with its rows: whether they are valid.
        others: The other nodes.
        steps: The steps of exchanges with one node after the other.
        comparer: Compares headers while an exchange lasts.
        rails: As given.
    """

    def __init__(self, context: Context, topology: Topology, rails: Rails, expected: Expected) -> None:
        self._context = context
        self._expected = expected
        self._rail = topology.rail
        self._node = topology.node
        self.own_state = context.window.base + CONTROL_BLOCK_OFFSETS["stopped"]
        self._num_nodes = topology.num_nodes
        self._open = open_template(context, topology)
        self._check = check_template(context, topology)
        self.comparer = Comparer(context.device, topology, context.flight_recorder)
        self._clock = clock_template(context)
        self.others = [node for node in range(topology.num_nodes) if node != topology.node]
        self.steps = _steps(topology.node, topology.num_nodes)
        self.rails = rails
        self._chunks: BoundedDict[tuple[int, bool], Chunks] = BoundedDict(_MAX_CHUNKS)

    def begin(self, signature: Signature, wait_ns: int = 0, *, skip_masked: bool = False) -> Call:
        """Begin a call, as `Context.begin`.

        Raises:
            TokenferryError: the error of an earlier call; PeerTimeout: one of its exchanges did not end in time.
        """
        call = self._context.begin(signature, skip_masked=skip_masked, wait_ns=wait_ns)
        with self._context.breaking_off():
            self.rails.raise_lost()
        return call

    def join(self, call: Call, transfer: Transfer, since: int) -> int:
        """Let the stream wait for an exchange; ``since``: address of an int64 for when it began, if waits are counted.

        Returns:
            int: ``since`` in that case, else 0.
        """
        if call.wait_ns:
            self._clock.pack(call.alive, call.number, call.signature.words, since)
            self._clock.launch(1, call.stream)
        transfer.join()
        return since if call.wait_ns else 0

    def new_words(self, chunks: int, num_bytes: int) -> tuple[Words, int]:
        """Return memory for what ranks say in a call, and the address of so many bytes behind it.

        Args:
            chunks: In how many chunks rows come from a node.
            num_bytes: Bytes of what the call needs besides; `Words.memory` keeps them, too.
        """
        headers = self._num_nodes * HEADER_BYTES
        (end,) = section_ends(2 * headers + STATE_BYTES * self._num_nodes * chunks)
        memory = self._context.empty((end + num_bytes,), (1,), torch.uint8)
        mine = memory.data_ptr()
        came = mine + headers
        return Words(memory, mine, came, came + headers, chunks), mine + end

    def open(self, call: Call, words: Words) -> Transfer:
        """Exchange only the headers of a call, ``words``: they have a fixed size, so that this ends in any case."""
        return self.rails.exchange(call, self._headers(words), words.memory)

    def _headers(self, words: Words) -> list[Part]:
        """Return the parts of the exchange of headers."""
        parts = []
        for node in self.others:
            at = node * HEADER_BYTES
            parts.append((words.headers + at, HEADER_BYTES, node, False))
            parts.append((words.mine + at, HEADER_BYTES, node, True))
        return parts

    def announce(self, call: Call, words: Words, chunks: Chunks, goes: int, comes: int, src_counts: int) -> Opening:
        """Write what a call along a plan says; ``chunks``: in which rows come; the others: see `Opening`."""
        self._open.pack(
            call.alive, call.number, call.signature.words,
            words.mine, words.headers, words.states, goes, comes, chunks.num, chunks.source, *chunks.table,
        )  # fmt: skip
        self._open.launch(1, call.stream)
        return Opening(words, goes, comes, src_counts, None)

    def counts(self, call: Call, words: Words, transfer: Transfer, num_tokens: int) -> tuple[int, ...]:
        """Return, by node, how many tokens come from the rail peer there; of the own node all T.

        Raises:
            MismatchError: a rail peer has made another call.
            PeerTimeout: one did not answer in time.
        """
        transfer.wait()
        mine, counts = struct.unpack(f"<{SIGNATURE_WORDS}i", call.signature.words), [num_tokens] * self._num_nodes
        said = self._read(words)
        for node in self.others:
            header = said[node * RAIL_WORDS : (node + 1) * RAIL_WORDS]
            for word, (seen, expected) in enumerate(zip(header, mine, strict=False)):
                if seen != expected:
                    raise self.comparer.mismatch(call, node, word, seen, expected)
            counts[node] = header[ROWS_WORD]
        return tuple(counts)

    def _read(self, words: Words) -> list[int]:
        """Return what the rail peers have said; waits for the device."""
        context, num = self._context, RAIL_WORDS * self._num_nodes
        said: list[int] = tensor_at(words.headers, (num,), torch.int32, context.device, words.memory).tolist()
        return said

    def verdicts(self, call: Call, most: int) -> list[int]:
        """Return, by node, what its ranks say there: the same number on all ranks of a node.

        Raises:
            PeerTimeout: a rail peer did not answer in time.
        """
        words = torch.full((len(self._rail), 1), most, dtype=torch.int32, device=self._context.device)
        at = words.data_ptr()
        parts = [(at + 4 * node, 4, node, False) for node in self.others]
        parts += [(at + 4 * self._node, 4, node, True) for node in self.others]
        self.rails.exchange(call, parts, words).wait()
        verdicts: list[int] = words[:, 0].tolist()
        return verdicts

    def nodes_without(self, call: Call, has_room: bool) -> list[int]:
        """Return the nodes whose ranks lack memory for a call; see `MessageRails.nodes_without`.

        What ranks say about the call goes first, as in any exchange that begins one, so that different calls meet.

        Raises:
            MismatchError, PeerTimeout: as `counts`.
        """
        words, _ = self.new_words(1, 0)
        said = torch.full((self._num_nodes, 1), int(has_room), dtype=torch.int32, device=self._context.device)
        self.announce(call, words, Chunks.new(self.steps[0], (0,)), said.data_ptr(), 0, 0)
        found = self.counts(call, words, self.open(call, words), int(has_room))
        return [node for node, has in enumerate(found) if not has]

    def routing(self, call: Call, routing: CrossingRouting, words: Words, *, opens: bool) -> Transfer | None:
        """Exchange what tokens carry, with all nodes at once; return the exchange, or None if nothing crosses.

        Args:
            call: The call.
            routing: The routing.
            words: What ranks say in the call.
            opens: Whether that crosses along with it, first; else it has crossed.
        """
        start, parts, compare = routing.ids, [], None
        if opens:  # the exchange of different calls may not end
            parts, compare = self._headers(words), partial(self.comparer.compare, call, HeaderAddresses(words.headers))
        for at, num_bytes, node, is_sent in routing.parts:
            parts.append((start + at, num_bytes, node, is_sent))
        return self.rails.exchange(call, parts, (routing.memory, words.memory), compare) if parts else None

    def rows(
        self,
        call: Call,
        swaps: Sequence[Swap],
        words: Words,
        send_at: int,
        recv_at: int,
        kept: object = None,
        opening: Opening | None = None,
    ) -> Transfers:
        """Exchange chunks of rows, with their senders' states.

        Args:
            call: The call.
            swaps: The chunks.
            words: Where states come.
            send_at: Where the parcels for all other nodes begin.
            recv_at: Where those from there do.
            kept: Keeps the memory, besides that of ``words``.
            opening: What the call says first, along with the first of these chunks that is not empty, or with number 0:
                the same one on both ranks. None: it has.

        Returns:
            dict: the exchanges, but of chunks that are empty on both sides.
        """
        made: Transfers = {}
        parts, compare, keep, own_state = [], None, (words.memory, kept), self.own_state
        if opening is not None and opening.transfer is None:  # the exchange of different calls may not end
            _, goes, comes, src_counts, _ = opening
            parts = self._headers(words)
            compare = partial(self.comparer.compare, call, HeaderAddresses(words.headers, goes, comes, src_counts))
        for send, recv, number, _, _ in swaps:
            # The other rank may not list a chunk that is empty, so what the call says does not go with it.
            if number and not (send.num or recv.num):
                continue
            if recv.num:
                state = words.states + STATE_BYTES * (recv.node * words.chunks + number)
                parts.append((recv_at + recv.at, recv.num_bytes, recv.node, False))
                parts.append((state, STATE_BYTES, recv.node, False))
            if send.num:
                parts.append((send_at + send.at, send.num_bytes, send.node, True))
                parts.append((own_state, STATE_BYTES, send.node, True))
            if parts:
                made[recv.node, number] = self.rails.exchange(call, parts, keep, compare)
            parts, compare = [], None
        return made

    def chunks(self, row_bytes: int, *, back: bool = False) -> Chunks:
        """Return in which chunks rows cross, or with ``back`` sums."""
        found = self._chunks.get((row_bytes, back))
        if found is None:
            found = self._chunks[row_bytes, back] = Chunks.of(self.steps, self._expected, row_bytes, back=back)
        return found

    def no_counts(self, src_counts: int) -> Tensor:
        """Return ``[R]`` int64: 0 for each rank, -1 if the plan was aborted; see `RelayAddresses`.

        ``src_counts``: address of `Plan.src_counts`.
        """
        context = self._context
        num_ranks = self._num_nodes * context.num_ranks
        return tensor_at(src_counts, (num_ranks,), torch.int64, context.device, context.window).clamp(max=0)

    def confirm(self, call: Call, opening: Opening) -> None:
        """Launch what makes later kernels no-ops if a rail peer made another call.

        ``opening``: what the call has said.
        """
        words, goes, comes, src_counts, _ = opening
        self._check.pack(
            0, call.alive, call.number, call.signature.words,
            words.headers, 0, 0, goes, comes, 0, src_counts, 0, 0, 1,
            int(call.skips_masked),
        )  # fmt: skip
        self._check.launch(1, call.stream)

    def check(
        self, call: Call, words: Words, src_counts: int, swap: Swap | None = None, opening: Opening | None = None
    ) -> None:
        """Launch what makes later kernels no-ops if a rail peer sent undefined data, or none.

        Args:
            call: The call.
            words: Where the states of senders have come.
            src_counts: Address of `Plan.src_counts`, -1 if the plan was aborted.
            swap: The exchange that brought one; None: all of them have come.
            opening: What has come with them, to be confirmed, too; None: nothing, or it was.
        """
        chunks = words.chunks
        first, num = (0, self._num_nodes * chunks) if swap is None else (swap.recv.node * chunks + swap.number, 1)
        headers, goes, comes = (0, 0, 0) if opening is None else (words.headers, opening.goes, opening.comes)
        self._check.pack(
            0, call.alive, call.number, call.signature.words,
            headers, 0, 0, goes, comes, words.states + STATE_BYTES * first, src_counts, num, first, chunks, 0,
        )  # fmt: skip
        self._check.launch(1, call.stream)


def _steps(node: int, num_nodes: int) -> list[Step]:
    """Return, for each step, the node to send to and the one to receive from.

    In each step every rank of a rail sends to one and receives from one, and no two to the same.
    """
    return [Step((node + step) % num_nodes, (node - step) % num_nodes) for step in range(1, num_nodes)]
