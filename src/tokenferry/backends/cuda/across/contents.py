"""What crosses between nodes in a call, and the memory that it lies in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenferry.backends.cuda.across.rails import Parcel, Rows, Transfer
from tokenferry.backends.cuda.across.relay import Relay
from tokenferry.backends.cuda.buffers import section_ends
from tokenferry.backends.cuda.context import Context
from tokenferry.backends.cuda.launch import RowKind

STATE_BYTES = 8
"""Of the state of a chunk."""


class States(NamedTuple):
    """Some of the states of `Words`.

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


class Words(NamedTuple):
    """What the ranks across from this one say in a call.

    An exchange that is given up ends as any other: headers stay zeros, and `NOTHING_CAME` stays in states, so that what
    it should have brought is not taken for good.

    Attributes:
        memory: Keeps them: ``headers``, then ``states``.
        headers: ``[N, RAIL_WORDS]`` int32, before anything else crosses; zeros for the own node.
        states: Address of ``[N, chunks, 2]`` int32: their states when they sent a chunk.
        num_states: N times chunks.
        chunks: Chunks of a node.
    """

    memory: Tensor
    headers: Rows
    states: int
    num_states: int
    chunks: int

    def all_states(self) -> States:
        """Return all of them."""
        return States(self.states, self.num_states, 0, self.chunks)

    def state(self, node: int, chunk: int) -> States:
        """Return that of a chunk."""
        first = node * self.chunks + chunk
        return States(self.states + STATE_BYTES * first, 1, first, self.chunks)


class Opening(NamedTuple):
    """The beginning of a call along a plan.

    Attributes:
        words: What the ranks across from this one say about it.
        transfer: The exchange that brings it.
        goes: Address of ``[N]`` int32: rows for each node along the plan of this rank; 0: there is none.
        comes: The same of rows from there.
    """

    words: Words
    transfer: Transfer
    goes: int
    comes: int


class Routing(NamedTuple):
    """The routing of all tokens that a rank passes on, its own included, and of those that it sends to other nodes.

    Attributes:
        memory: Holds all of it.
        ids: ``[N, segment, K]``: their experts on this node; -1 in the padding of segments.
        tokens: Numbers of the tokens from other nodes, on the ranks that they come from.
        ids_out: The same for other nodes.
        tokens_out: Likewise.
        relay: How much of it crosses.
    """

    memory: Tensor
    ids: Rows
    tokens: Rows
    ids_out: Rows
    tokens_out: Rows
    relay: Relay


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
        parts: The rows; then the scales of each row, and its weights, float32, if there are any.
        rows: Address of the rows.
        scale: Address of the scales; 0: there are none.
        weights: Address of the weights; 0: there are none.
    """

    memory: Tensor
    parts: list[Rows]
    rows: int
    scale: int
    weights: int

    @classmethod
    def empty(cls, context: Context, widths: RowWidths, num_rows: int) -> RowMemory:
        """Return undefined rows."""
        row_bytes, scale_bytes, weight_bytes = widths
        scale_at, weights_at, end = section_ends(num_rows * row_bytes, num_rows * scale_bytes, num_rows * weight_bytes)
        memory = context.empty((end,), (1,), torch.uint8)
        rows = memory.data_ptr()
        scale, weights = rows + scale_at if scale_bytes else 0, rows + weights_at if weight_bytes else 0
        parts = [Rows(rows, row_bytes)]
        if scale:
            parts.append(Rows(scale, scale_bytes))
        if weights:
            parts.append(Rows(weights, weight_bytes))
        return cls(memory, parts, rows, scale, weights)

    def parcels(self, first: int, num: int) -> list[Parcel]:
        """Return some of the rows, and what travels with them."""
        return [Parcel(at + first * width, num * width) for at, width in self.parts]


class RowWidths(NamedTuple):
    """Bytes of a row, of its scales and of its weights; 0: there are none."""

    row: int
    scale: int
    weights: int

    @classmethod
    def of(cls, kind: RowKind) -> RowWidths:
        """Return those of a kind of rows."""
        return cls(kind.row_bytes, kind.scale_bytes, 4 * kind.top_k if kind.weighted else 0)
