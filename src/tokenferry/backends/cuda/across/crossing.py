"""What crosses between nodes in a call: counts, routing, rows and sums, each to and from the ranks of a rail."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenferry.backends.cuda.across.launch import check_template, clock_template, open_template
from tokenferry.backends.cuda.across.rails import NoTransfer, Parcels, Rails, Transfer
from tokenferry.backends.cuda.across.relay import Chunks, Relay
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
        return cls(states.data_ptr() + 8 * first, 1, first, chunks)


_NOTHING = NoTransfer()
_NO_STATES = States(0, 0, 0, 1)


class Sums(NamedTuple):
    """The sums of a chunk of tokens, for a node or from it.

    Attributes:
        node: The node.
        num_tokens: How many there are.
        tensors: Sums of rows, and of weights if there are any.
    """

    node: int
    num_tokens: int
    tensors: list[Tensor]


class RowTensors(NamedTuple):
    """Rows that cross, and what travels with them; scales and weights lie side by side.

    Attributes:
        rows: ``[n, row_bytes]`` uint8.
        scale: ``[n, S]``, or None.
        weights: ``[n, K]`` float32, or None.
    """

    rows: Tensor
    scale: Tensor | None
    weights: Tensor | None

    def present(self) -> list[Tensor]:
        """Return those that are not None."""
        return [tensor for tensor in self if tensor is not None]


def empty_rows(kind: RowKind, num_rows: int, device: torch.device) -> RowTensors:
    """Return undefined rows."""
    rows = torch.empty(num_rows, kind.row_bytes, dtype=torch.uint8, device=device)
    scale = weights = None
    if kind.scale_bytes and kind.scale_dtype is not None:
        scale = torch.empty(num_rows, kind.scale_columns, dtype=kind.scale_dtype, device=device)
    if kind.weighted:
        weights = torch.empty(num_rows, kind.top_k, dtype=torch.float32, device=device)
    return RowTensors(rows, scale, weights)


class Crossing:
    """The exchanges of one rank with those across from it.

    Args:
        context: Context of this rank.
        topology: The nodes.
        rails: What carries the exchanges.
        max_tokens: M of the group.
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
        self.rails = rails

    def begin(self, signature: Signature, wait_ns: int = 0) -> Call:
        """Begin a call, as `Context.begin`.

        Raises:
            TokenferryError: the error of an earlier call; PeerTimeout: one of its exchanges did not end in time.
        """
        call = self._context.begin(signature, wait_ns=wait_ns)
        with self._context.breaking_off():
            self.rails.raise_lost()
        return call

    def exchange(self, call: Call, send: Parcels, recv: Parcels) -> Transfer:
        """Begin an exchange, behind the work of the current stream."""
        if not send and not recv:
            return _NOTHING
        return self.rails.exchange(CallId(call.number, f"{call.signature.phase} (between nodes)"), send, recv)

    def join(self, call: Call, transfer: Transfer, since: Tensor) -> int:
        """Let the stream wait for an exchange; ``since``: ``[1]`` int64, for when it began to, if somebody counts.

        Returns:
            int: the address of ``since`` in that case, else 0.
        """
        if call.wait_ns:
            self._clock.pack(0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0, since.data_ptr())
            self._clock.launch(1, call.stream)
        transfer.join()
        return since.data_ptr() if call.wait_ns else 0

    def open(self, call: Call, headers: Tensor, goes: int = 0, comes: int = 0) -> Opening:
        """Exchange what ranks say about a call: first in every call and of one size, so that different calls meet here.

        Args:
            call: The call.
            headers: ``[N, RAIL_WORDS]`` int32: what to say to each node.
            goes: See `Opening`.
            comes: See `Opening`.
        """
        came = torch.zeros_like(headers)
        send = {node: [headers[node]] for node in self.others}
        transfer = self.exchange(call, send, {node: [came[node]] for node in self.others})
        return Opening(came, goes, comes, transfer)

    def open_along(self, call: Call, goes: int, comes: int) -> Opening:
        """Open a call that follows a plan.

        Args:
            call: The call.
            goes: Address of ``[N]`` int32: rows for each node; 0: none.
            comes: The same of rows from there.
        """
        headers = torch.empty(self._num_nodes, RAIL_WORDS, dtype=torch.int32, device=self._context.device)
        self._open.pack(
            0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0, headers.data_ptr(), goes, comes
        )
        self._open.launch(1, call.stream)
        return self.open(call, headers, goes, comes)

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
        send = {node: [words[self._node]] for node in self.others}
        self.exchange(call, send, {node: [words[node]] for node in self.others}).wait()
        verdicts: list[int] = words[:, 0].tolist()
        return verdicts

    def routing(self, call: Call, relay: Relay, send: Sequence[Tensor], recv: Sequence[Tensor]) -> Transfer:
        """Exchange the tensors about tokens, with all nodes at once.

        Args:
            call: The call.
            relay: How many tokens cross.
            send: Tensors about tokens for all other nodes.
            recv: First the routing of all segments, then tensors about tokens from all other nodes.
        """
        ids, *rest = recv
        segments = ids.view(relay.num_nodes, relay.segment, -1)
        return self.exchange(
            call,
            {node: [relay.part_out(each, node) for each in send] for node in self.others if relay.went[node]},
            {
                node: [segments[node, : relay.came[node]], *(relay.part_in(each, node) for each in rest)]
                for node in self.others
                if relay.came[node]
            },
        )

    def rows(
        self, call: Call, relay: Relay, send: RowTensors, recv: RowTensors, states: Tensor
    ) -> dict[int, list[Transfer]]:
        """Exchange rows, with one node after the other; return the exchanges by the node from which rows come.

        There is one for each chunk.

        Args:
            call: The call.
            relay: How many tokens cross.
            send: Rows for all other nodes.
            recv: Rows from all other nodes.
            states: As `new_states` returns them.
        """
        made: dict[int, list[Transfer]] = {}
        chunks, out, into = self.chunks(send.rows.shape[1]), send.present(), recv.present()
        for to, source in self.steps():
            gone, come = chunks.split(relay.went[to]), chunks.split(relay.came[source])
            parts_out = [relay.part_out(each, to) for each in out]
            parts_in = [relay.part_in(each, source) for each in into]
            made[source] = []
            for chunk, (go, comes) in enumerate(zip(gone, come, strict=True)):
                sent = {to: [*map(go.of, parts_out), self.state]} if go.num else {}
                received = {source: [*map(comes.of, parts_in), states[source, chunk]]} if comes.num else {}
                made[source].append(self.exchange(call, sent, received))
        return made

    def sums(self, call: Call, send: Sums, recv: Sums, state: Tensor) -> Transfer:
        """Exchange the sums of a chunk with two nodes: one to send to, and one to receive from, with its state."""
        return self.exchange(
            call,
            {send.node: [*send.tensors, self.state]} if send.num_tokens else {},
            {recv.node: [*recv.tensors, state]} if recv.num_tokens else {},
        )

    def chunks(self, row_bytes: int) -> Chunks:
        """Return in which chunks rows cross."""
        return Chunks.of(self._max_tokens, row_bytes)

    def no_counts(self, plan: Plan) -> Tensor:
        """Return ``[R]`` int64: 0 for each rank, -1 if the plan was aborted; see `RelayAddresses`."""
        return plan.src_counts.clamp(max=0)

    def new_states(self, comes: Sequence[int], chunks: Chunks) -> Tensor:
        """Return ``[N, chunks, 2]`` int32, for the states of the ranks across from this one when they sent a chunk.

        An exchange that is given up ends as any other: `NOTHING_CAME` stays in its states, so that what it should have
        brought is not taken for good. Where there is nothing to come, states are 0.

        Args:
            comes: Rows from each node.
            chunks: In which chunks they come.
        """
        device = self._context.device
        states = torch.full((self._num_nodes, chunks.num, 2), -1, dtype=torch.int32, device=device)
        for node, num in enumerate(comes):
            used = 0 if node == self._node else sum(chunk.num > 0 for chunk in chunks.split(num))
            if used < chunks.num:
                states[node, used:].zero_()
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

    def steps(self) -> list[Step]:
        """Return, for each step, the node to send to and the one to receive from.

        In each step every rank of a rail sends to one and receives from one, and no two to the same.
        """
        num_nodes = len(self._rail)
        return [Step((self._node + step) % num_nodes, (self._node - step) % num_nodes) for step in range(1, num_nodes)]

    def _mismatch(self, call: Call, node: int, word: int, seen: int, expected: int) -> TokenferryError:
        record = Record(Fault.node_mismatch, call.number, 0, word, seen, expected, self._rail[node], 0)
        return self._context.flight_recorder.explain(record)
