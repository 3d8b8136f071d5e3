"""What crosses between nodes in a call: counts, routing, rows and sums, each to and from the ranks of a rail."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenferry.backends.cuda.across.launch import check_template, clock_template, open_template
from tokenferry.backends.cuda.across.rails import NoTransfer, Parcel, Parcels, Rails, Rows, Transfer
from tokenferry.backends.cuda.across.relay import Chunks, Relay
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.buffers import section_ends
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.faults import Record
from tokenferry.backends.cuda.launch import RowKind
from tokenferry.backends.cuda.signature import Signature
from tokenferry.errors import TokenferryError
from tokenferry.kernels.control_block import CONTROL_BLOCK_OFFSETS, RAIL_WORDS, ROWS_WORD, SIGNATURE_WORDS, Fault
from tokenferry.memory.tensor import tensor_at
from tokenferry.topology import Topology
from tokenferry.transports.base import CallId
from tokenferry.types import Plan


class Step(NamedTuple):
    """One of several exchanges of a call.

    Attributes:
        to: The node to send to.
        source: The node to receive from.
    """

    to: int
    source: int


class Opening(NamedTuple):
    """What the ranks across from this one say about a call, before anything else crosses.

    Attributes:
        headers: ``[N, RAIL_WORDS]`` int32; zeros for the own node, and where nothing has come.
        goes: Address of ``[N]`` int32: rows for each node along the plan of this rank; 0: there is none yet.
        comes: The same of rows from there.
        transfer: The exchange.
    """

    headers: Tensor
    goes: int
    comes: int
    transfer: Transfer


class States(NamedTuple):
    """Some of the states that `Crossing.new_states` returns.

    Attributes:
        address: Address of the first.
        num: How many there are.
        first: Number of the first, of node 0 and then of its chunks on.
        chunks: Chunks of a node.
    """

    address: int
    num: int
    first: int
    chunks: int

    @classmethod
    def of(cls, states: Tensor) -> States:
        """Return all of them."""
        return cls(states.data_ptr(), states.shape[0] * states.shape[1], 0, states.shape[1])

    @classmethod
    def of_chunk(cls, states: Tensor, node: int, chunk: int) -> States:
        """Return that of a chunk."""
        chunks = states.shape[1]
        first = node * chunks + chunk
        return cls(states.data_ptr() + _STATE_BYTES * first, 1, first, chunks)

    def parcel(self) -> Parcel:
        """Return their memory."""
        return Parcel(self.address, self.num * _STATE_BYTES)


_MAX_PATTERNS = 256
_STATE_BYTES = 8
_NOTHING = NoTransfer()
_NO_STATES = States(0, 0, 0, 1)


class Sums(NamedTuple):
    """The sums of a chunk of tokens, for a node or from it.

    Attributes:
        node: The node.
        num_tokens: How many there are.
        parcels: Sums of rows, and of weights if there are any.
    """

    node: int
    num_tokens: int
    parcels: list[Parcel]


class RowMemory(NamedTuple):
    """Rows that cross, and what travels with them.

    Attributes:
        memory: Keeps them.
        rows: The rows.
        scale: The scales of each row, side by side, or None.
        scales: How many these are.
        weights: The weights of each row, float32, or None.
    """

    memory: Tensor
    rows: Rows
    scale: Rows | None
    scales: int
    weights: Rows | None

    @classmethod
    def empty(cls, context: Context, kind: RowKind, num_rows: int) -> RowMemory:
        """Return undefined rows."""
        row_bytes, scale_bytes = kind.row_bytes, 0 if kind.scale_dtype is None else kind.scale_bytes
        weight_bytes = 4 * kind.top_k if kind.weighted else 0
        scale_at, weights_at, end = section_ends(num_rows * row_bytes, num_rows * scale_bytes, num_rows * weight_bytes)
        memory = context.empty((end,), (1,), torch.uint8)
        at = memory.data_ptr()
        return cls(
            memory,
            Rows(at, row_bytes),
            Rows(at + scale_at, scale_bytes) if scale_bytes else None,
            kind.scale_columns,
            Rows(at + weights_at, weight_bytes) if weight_bytes else None,
        )

    def present(self) -> list[Rows]:
        """Return what there is of the three."""
        return [rows for rows in (self.rows, self.scale, self.weights) if rows is not None]


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

    def open(self, call: Call, headers: Rows, kept: Tensor, goes: int = 0, comes: int = 0) -> Opening:
        """Exchange what ranks say about a call: first in every call and of one size, so that different calls meet here.

        Args:
            call: The call.
            headers: ``[N, RAIL_WORDS]`` int32: what to say to each node.
            kept: Keeps them.
            goes: See `Opening`.
            comes: See `Opening`.
        """
        came = torch.zeros(self._num_nodes, RAIL_WORDS, dtype=torch.int32, device=self._context.device)
        transfer = self.exchange_headers(call, headers, Rows.of(came), came, kept)
        return Opening(came, goes, comes, transfer)

    def exchange_headers(self, call: Call, send: Rows, recv: Rows, *kept: object) -> Transfer:
        """Begin to exchange a header with each other node; ``send``, ``recv``: those of all nodes."""
        return self.exchange(
            call,
            {node: (send.part(node, 1),) for node in self.others},
            {node: (recv.part(node, 1),) for node in self.others},
            *kept,
        )

    def open_along(self, call: Call, goes: int, comes: int) -> Opening:
        """Open a call that follows a plan.

        Args:
            call: The call.
            goes: Address of ``[N]`` int32: rows for each node; 0: none.
            comes: The same of rows from there.
        """
        headers = self._context.empty((self._num_nodes, RAIL_WORDS), (RAIL_WORDS, 1), torch.int32)
        self._open.pack(
            0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0, headers.data_ptr(), goes, comes
        )
        self._open.launch(1, call.stream)
        return self.open(call, Rows.of(headers), headers, goes, comes)

    def counts(self, call: Call, opening: Opening, num_tokens: int) -> tuple[int, ...]:
        """Return, by node, how many tokens come from the rank across there; of the own node all T.

        Raises:
            MismatchError: a rank across from this one has made another call.
            PeerTimeout: one did not answer in time.
        """
        opening.transfer.wait()
        mine, counts = struct.unpack(f"<{SIGNATURE_WORDS}i", call.signature.words), [num_tokens] * self._num_nodes
        headers = opening.headers.tolist()
        for node in self.others:
            for word, (seen, expected) in enumerate(zip(headers[node], mine, strict=False)):
                if seen != expected:
                    raise self._mismatch(call, node, word, seen, expected)
            counts[node] = headers[node][ROWS_WORD]
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

    def routing(self, call: Call, relay: Relay, send: Sequence[Rows], recv: Sequence[Rows], kept: Tensor) -> Transfer:
        """Exchange what tokens carry, with all nodes at once.

        Args:
            call: The call.
            relay: How many tokens cross.
            send: Rows about tokens for all other nodes.
            recv: First the routing of all segments, then rows about tokens from all other nodes.
            kept: Keeps them.
        """
        ids, *rest = recv
        went, came, segment = relay.went, relay.came, relay.segment
        return self.exchange(
            call,
            {
                node: [rows.part(relay.first_out[node], went[node]) for rows in send]
                for node in self.others
                if went[node]
            },
            {
                node: [
                    ids.part(node * segment, came[node]),
                    *(rows.part(relay.first_in[node], came[node]) for rows in rest),
                ]
                for node in self.others
                if came[node]
            },
            kept,
        )

    def rows(
        self, call: Call, relay: Relay, send: RowMemory, recv: RowMemory, states: Tensor
    ) -> dict[int, list[Transfer]]:
        """Exchange rows, with one node after the other; return the exchanges by the node from which rows come.

        There is one for each chunk in which there are tokens.

        Args:
            call: The call.
            relay: How many tokens cross.
            send: Rows for all other nodes.
            recv: Rows from all other nodes.
            states: As `new_states` returns them.
        """
        made: dict[int, list[Transfer]] = {}
        chunks, out, into = self.chunks(send.rows.row_bytes), send.present(), recv.present()
        for to, source in self.steps:
            went, came, transfers = relay.went[to], relay.came[source], []
            first_out, first_in = relay.first_out[to], relay.first_in[source]
            for i in range(max(chunks.count(went), chunks.count(came))):
                (go, num_go), (come, num_come) = chunks.chunk(went, i), chunks.chunk(came, i)
                sent: Parcels = {}
                received: Parcels = {}
                if num_go:
                    sent = {to: [*[rows.part(first_out + go, num_go) for rows in out], self.own_state]}
                if num_come:
                    state = States.of_chunk(states, source, i).parcel()
                    received = {source: [*[rows.part(first_in + come, num_come) for rows in into], state]}
                transfers.append(self.exchange(call, sent, received, send.memory, recv.memory, states))
            made[source] = transfers
        return made

    def sums(self, call: Call, send: Sums, recv: Sums, state: States, *kept: object) -> Transfer:
        """Exchange the sums of a chunk with two nodes: one to send to, and one to receive from, with its state."""
        return self.exchange(
            call,
            {send.node: [*send.parcels, self.own_state]} if send.num_tokens else {},
            {recv.node: [*recv.parcels, state.parcel()]} if recv.num_tokens else {},
            *kept,
        )

    def chunks(self, row_bytes: int) -> Chunks:
        """Return in which chunks rows cross."""
        found = self._chunks.get(row_bytes)
        if found is None:
            found = self._chunks[row_bytes] = Chunks.of(self._max_tokens, row_bytes)
        return found

    def no_counts(self, plan: Plan) -> Tensor:
        """Return ``[R]`` int64: 0 for each rank, -1 if the plan was aborted; see `RelayAddresses`."""
        return plan.src_counts.clamp(max=0)

    def new_states(self, call: Call, comes: Sequence[int], chunks: Chunks) -> Tensor:
        """Return ``[N, chunks, 2]`` int32, for the states of the ranks across from this one when they sent a chunk.

        An exchange that is given up ends as any other: `NOTHING_CAME` stays in its states, so that what it should have
        brought is not taken for good. Where there is nothing to come, states are 0.

        Args:
            call: The call.
            comes: Rows from each node.
            chunks: In which chunks they come.
        """
        used = (chunks.num, *(0 if node == self._node else chunks.count(num) for node, num in enumerate(comes)))
        pattern = self._patterns.get(used)
        if pattern is not None:
            return pattern.clone()
        device = self._context.device
        states = torch.full((self._num_nodes, chunks.num, 2), -1, dtype=torch.int32, device=device)
        for node, num in enumerate(used[1:]):
            if num < chunks.num:
                states[node, num:].zero_()
        if not call.capturing:  # the memory would be the graph's
            self._patterns[used] = states.clone()
        return states

    def confirm(self, call: Call, opening: Opening, counts: int) -> None:
        """Let the stream wait for an opening, and check it, before it waits for what differs between calls.

        If ranks have made different calls, the exchanges that follow may never end; see `Rails.end_soon_if`.

        Args:
            call: The call.
            opening: What the ranks across from this one say about it.
            counts: Address of counts of the plan, -1 if it was aborted.
        """
        opening.transfer.join()
        self.check(call, opening, _NO_STATES, counts)

    def check(self, call: Call, opening: Opening, states: States, src_counts: int) -> None:
        """Launch what makes later kernels no-ops if a rank across made another call, or sent undefined data or none.

        Args:
            call: The call.
            opening: What these ranks said about it.
            states: Of what has come.
            src_counts: Address of `Plan.src_counts`.
        """
        self._check.pack(
            0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
            opening.headers.data_ptr(), 0, 0, opening.goes, opening.comes, states.address, src_counts,
            states.num, states.first, states.chunks,
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
