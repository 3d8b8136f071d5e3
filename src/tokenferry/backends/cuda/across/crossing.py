"""What crosses between nodes in a call: counts, routing, rows and sums, each to and from the ranks of a rail."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenferry.backends.cuda.across.contents import (
    STATE_BYTES,
    Opening,
    Routing,
    RowMemory,
    States,
    Sums,
    Words,
)
from tokenferry.backends.cuda.across.launch import check_template, clock_template, open_template
from tokenferry.backends.cuda.across.rails import NoTransfer, Parcel, Parcels, Rails, Rows, Transfer
from tokenferry.backends.cuda.across.relay import Chunks, Relay
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.faults import Record
from tokenferry.backends.cuda.signature import Signature
from tokenferry.errors import TokenferryError
from tokenferry.kernels.control_block import CONTROL_BLOCK_OFFSETS, RAIL_WORDS, ROWS_WORD, SIGNATURE_WORDS, Fault
from tokenferry.memory.tensor import tensor_at
from tokenferry.topology import Topology
from tokenferry.transports.base import CallId


class Step(NamedTuple):
    """One of several exchanges of a call.

    Attributes:
        to: The node to send to.
        source: The node to receive from.
    """

    to: int
    source: int


_MAX_PATTERNS = 256
_HEADER_BYTES = 4 * RAIL_WORDS
_NOTHING = NoTransfer()


class Crossing:
    """The exchanges of one rank with those across from it.

    Args:
        context: Context of this rank.
        topology: The nodes.
        rails: What carries the exchanges.
        max_tokens: M of the group.

    Attributes:
        state: What ranks tell with their rows: whether these are valid.
        own_state: Its memory.
        others: The other nodes.
        steps: The steps of exchanges with one node after the other.
        rails: As given.
    """

    def __init__(self, context: Context, topology: Topology, rails: Rails, max_tokens: int) -> None:
        self._context = context
        self._max_tokens = max_tokens
        self._rail = topology.rail
        self._node = topology.node
        self.state = tensor_at(
            context.window.base + CONTROL_BLOCK_OFFSETS["stopped"], (2,), torch.int32, context.device, context.window
        )
        self._num_nodes = topology.num_nodes
        self._open = open_template(context, topology)
        self._check = check_template(context, topology)
        self._clock = clock_template(context)
        self.others = [node for node in range(topology.num_nodes) if node != topology.node]
        self.steps = _steps(topology.node, topology.num_nodes)
        self.rails = rails
        self.own_state = Parcel.of(self.state)
        self._chunks: BoundedDict[int, Chunks] = BoundedDict(_MAX_PATTERNS)
        self._patterns: BoundedDict[tuple[int, ...], Tensor] = BoundedDict(_MAX_PATTERNS)
        # Replays copy these, so that they live as long as this object.
        self._in_graphs: dict[tuple[int, ...], Tensor] = {}

    def begin(self, signature: Signature, wait_ns: int = 0) -> Call:
        """Begin a call, as `Context.begin`.

        Raises:
            TokenferryError: the error of an earlier call; PeerTimeout: one of its exchanges did not end in time.
        """
        call = self._context.begin(signature, wait_ns=wait_ns)
        with self._context.breaking_off():
            self.rails.raise_lost()
        return call

    def exchange(self, call: Call, send: Parcels, recv: Parcels, *kept: object) -> Transfer:
        """Begin an exchange, behind the work of the current stream; see `Rails.exchange`."""
        if not send and not recv:
            return _NOTHING
        return self.rails.exchange(CallId(call.number, f"{call.signature.phase} (between nodes)"), send, recv, kept)

    def join(self, call: Call, transfer: Transfer, since: int) -> int:
        """Let the stream wait for an exchange; ``since``: address of an int64 for when it began, if somebody counts.

        Returns:
            int: ``since`` in that case, else 0.
        """
        if call.wait_ns:
            self._clock.pack(0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0, since)
            self._clock.launch(1, call.stream)
        transfer.join()
        return since if call.wait_ns else 0

    def new_words(self, call: Call, comes: Sequence[int] | None, chunks: Chunks) -> Words:
        """Return words in which nothing has come yet.

        Args:
            call: The call.
            comes: Rows from each node: states of chunks without any are 0. None: not known yet, and only the states of
                chunks that come may be looked at.
            chunks: In which chunks rows come.
        """
        used = [chunks.num]
        for node, num in enumerate(comes or ()):
            used.append(0 if node == self._node else min(chunks.num, -(-num // chunks.size)))
        key = tuple(used)
        pattern = self._patterns.get(key)
        if pattern is None:
            pattern = self._new_pattern(call, used)
        elif call.capturing:
            self._in_graphs[key] = pattern
        memory, num_states = pattern.clone(), self._num_nodes * chunks.num
        at = memory.data_ptr()
        return Words(memory, Rows(at, _HEADER_BYTES), at + _HEADER_BYTES * self._num_nodes, num_states, chunks.num)

    def _new_pattern(self, call: Call, used: list[int]) -> Tensor:
        kept = self._in_graphs.get(tuple(used))
        if kept is not None:
            self._patterns[tuple(used)] = kept
            return kept
        num_chunks, *counts = used
        num_words, device = RAIL_WORDS * self._num_nodes, self._context.device
        pattern = torch.full((num_words + 2 * self._num_nodes * num_chunks,), -1, dtype=torch.int32, device=device)
        pattern[:num_words].zero_()
        states = pattern[num_words:].view(self._num_nodes, num_chunks, 2)
        for node, num in enumerate(counts):
            if num < num_chunks:
                states[node, num:].zero_()
        if not call.capturing:  # the memory would be the graph's
            self._patterns[tuple(used)] = pattern
        return pattern

    def open(self, call: Call, words: Words, headers: Rows, kept: Tensor) -> Transfer:
        """Exchange what ranks say about a call: first in every call and of one size, so that different calls meet here.

        Args:
            call: The call.
            words: Where the headers of other ranks come.
            headers: ``[N, RAIL_WORDS]`` int32: what to say to each node.
            kept: Keeps them.
        """
        return self.exchange_headers(call, headers, words.headers, words.memory, kept)

    def exchange_headers(self, call: Call, send: Rows, recv: Rows, *kept: object) -> Transfer:
        """Begin to exchange a header with each other node; ``send``, ``recv``: those of all nodes."""
        sent: dict[int, list[Parcel]] = {}
        received: dict[int, list[Parcel]] = {}
        for node in self.others:
            at = node * _HEADER_BYTES
            sent[node] = [Parcel(send.address + at, _HEADER_BYTES)]
            received[node] = [Parcel(recv.address + at, _HEADER_BYTES)]
        return self.exchange(call, sent, received, *kept)

    def open_along(self, call: Call, words: Words, goes: int, comes: int) -> Opening:
        """Open a call that follows a plan; ``goes``, ``comes``: see `Opening`."""
        headers = self._context.empty((self._num_nodes, RAIL_WORDS), (RAIL_WORDS, 1), torch.int32)
        at = headers.data_ptr()
        self._open.pack(0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0, at, goes, comes)
        self._open.launch(1, call.stream)
        return Opening(words, self.open(call, words, Rows(at, _HEADER_BYTES), headers), goes, comes)

    def counts(self, call: Call, words: Words, transfer: Transfer, num_tokens: int) -> tuple[int, ...]:
        """Return, by node, how many tokens come from the rank across there; of the own node all T.

        Raises:
            MismatchError: a rank across from this one has made another call.
            PeerTimeout: one did not answer in time.
        """
        transfer.wait()
        mine, counts = struct.unpack(f"<{SIGNATURE_WORDS}i", call.signature.words), [num_tokens] * self._num_nodes
        said = words.memory[: RAIL_WORDS * self._num_nodes].tolist()
        for node in self.others:
            header = said[node * RAIL_WORDS : (node + 1) * RAIL_WORDS]
            for word, (seen, expected) in enumerate(zip(header, mine, strict=False)):
                if seen != expected:
                    raise self._mismatch(call, node, word, seen, expected)
            counts[node] = header[ROWS_WORD]
        return tuple(counts)

    def verdicts(self, call: Call, most: int) -> list[int]:
        """Return, by node, what its ranks say there: the same number on all ranks of a node.

        Raises:
            PeerTimeout: a rank across from this one did not answer in time.
        """
        words = torch.full((len(self._rail), 1), most, dtype=torch.int32, device=self._context.device)
        rows = Rows.of(words)
        send = {node: [rows.part(self._node, 1)] for node in self.others}
        self.exchange(call, send, {node: [rows.part(node, 1)] for node in self.others}, words).wait()
        verdicts: list[int] = words[:, 0].tolist()
        return verdicts

    def routing(self, call: Call, routing: Routing, words: Words, headers: Rows | None, *kept: object) -> Transfer:
        """Exchange what tokens carry, with all nodes at once.

        Args:
            call: The call.
            routing: The routing.
            words: Where the headers of other ranks come.
            headers: ``[N, RAIL_WORDS]`` int32: what to say to each node along with it, first; None: that has crossed.
            kept: Keeps the memory.
        """
        _, ids, tokens, ids_out, tokens_out, relay = routing
        send: dict[int, list[Parcel]] = {}
        recv: dict[int, list[Parcel]] = {}
        for node in self.others:
            went, came, first_out, first_in = (
                relay.went[node], relay.came[node], relay.first_out[node], relay.first_in[node],
            )  # fmt: skip
            if went:
                send[node] = [
                    Parcel(ids_out.address + first_out * ids_out.row_bytes, went * ids_out.row_bytes),
                    Parcel(tokens_out.address + first_out * tokens_out.row_bytes, went * tokens_out.row_bytes),
                ]
            if came:
                recv[node] = [
                    Parcel(ids.address + node * relay.segment * ids.row_bytes, came * ids.row_bytes),
                    Parcel(tokens.address + first_in * tokens.row_bytes, came * tokens.row_bytes),
                ]
            if headers is not None:
                send[node].insert(0, Parcel(headers.address + node * _HEADER_BYTES, _HEADER_BYTES))
                recv[node].insert(0, Parcel(words.headers.address + node * _HEADER_BYTES, _HEADER_BYTES))
        return self.exchange(call, send, recv, routing.memory, words.memory, *kept)

    def rows(
        self, call: Call, relay: Relay, chunks: Chunks, send: RowMemory, recv: RowMemory, words: Words
    ) -> list[list[Transfer]]:
        """Exchange rows, with one node after the other; return the exchanges by step.

        There is one for each chunk in which there are tokens.

        Args:
            call: The call.
            relay: How many tokens cross.
            chunks: In which chunks.
            send: Rows for all other nodes.
            recv: Rows from all other nodes.
            words: Where states come.
        """
        made: list[list[Transfer]] = []
        for to, source in self.steps:
            goes, comes, transfers = chunks.cut(relay.went[to]), chunks.cut(relay.came[source]), []
            for i in range(max(len(goes), len(comes))):
                sent: Parcels = {}
                received: Parcels = {}
                if i < len(goes):
                    go, num = goes[i]
                    sent = {to: [*send.parcels(relay.first_out[to] + go, num), self.own_state]}
                if i < len(comes):
                    come, num = comes[i]
                    state = Parcel(words.state(source, i).address, STATE_BYTES)
                    received = {source: [*recv.parcels(relay.first_in[source] + come, num), state]}
                transfers.append(self.exchange(call, sent, received, send.memory, recv.memory, words.memory))
            made.append(transfers)
        return made

    def sums(self, call: Call, send: Sums, recv: Sums, state: States, *kept: object) -> Transfer:
        """Exchange the sums of a chunk with two nodes: one to send to, and one to receive from, with its state."""
        return self.exchange(
            call,
            {send.node: [*send.parcels, self.own_state]} if send.num_tokens else {},
            {recv.node: [*recv.parcels, Parcel(state.address, STATE_BYTES)]} if recv.num_tokens else {},
            *kept,
        )

    def chunks(self, row_bytes: int) -> Chunks:
        """Return in which chunks rows cross."""
        found = self._chunks.get(row_bytes)
        if found is None:
            found = self._chunks[row_bytes] = Chunks.of(self._max_tokens, row_bytes)
        return found

    def no_counts(self, src_counts: int) -> Tensor:
        """Return ``[R]`` int64: 0 for each rank, -1 if the plan was aborted; see `RelayAddresses`.

        ``src_counts``: address of `Plan.src_counts`.
        """
        context = self._context
        num_ranks = self._num_nodes * context.num_ranks
        return tensor_at(src_counts, (num_ranks,), torch.int64, context.device, context.window).clamp(max=0)

    def confirm(self, call: Call, opening: Opening, src_counts: int) -> None:
        """Let the stream wait for an opening, and check it, before it waits for what differs between calls.

        If ranks have made different calls, the exchanges that follow may never end; see `Rails.end_soon_if`.

        Args:
            call: The call.
            opening: Its opening.
            src_counts: Address of `Plan.src_counts`, -1 if the plan was aborted.
        """
        opening.transfer.join()
        self._check.pack(
            0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
            opening.words.headers.address, 0, 0, opening.goes, opening.comes, 0, src_counts, 0, 0, 1,
        )  # fmt: skip
        self._check.launch(1, call.stream)

    def check(self, call: Call, states: States, src_counts: int) -> None:
        """Launch what makes later kernels no-ops if a rank across from this one sent undefined data, or none.

        Args:
            call: The call.
            states: Of what has come.
            src_counts: As for `confirm`.
        """
        address, num, first, chunks = states
        self._check.pack(
            0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
            0, 0, 0, 0, 0, address, src_counts, num, first, chunks,
        )  # fmt: skip
        self._check.launch(1, call.stream)

    def _mismatch(self, call: Call, node: int, word: int, seen: int, expected: int) -> TokenferryError:
        record = Record(Fault.node_mismatch, call.number, 0, word, seen, expected, self._rail[node], 0)
        return self._context.flight_recorder.explain(record)


def _steps(node: int, num_nodes: int) -> list[Step]:
    """Return, for each step, the node to send to and the one to receive from.

    In each step every rank of a rail sends to one and receives from one, and no two to the same.
    """
    return [Step((node + step) % num_nodes, (node - step) % num_nodes) for step in range(1, num_nodes)]
