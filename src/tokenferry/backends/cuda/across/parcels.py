"""What crosses between nodes in a call, and in which parcels: one operation of NCCL moves each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tokenferry import tuning
from tokenferry.backends.cuda.across.rails import Part
from tokenferry.backends.cuda.launch import RowKind
from tokenferry.kernels.codes import RAIL_CHUNKS

_ALIGNMENT = 16
_WEIGHT_BYTES = 4
_TOKEN_BYTES = 4
_ID_BYTES = 2


class RowWidths(NamedTuple):
    """Bytes of a row, of its scales and of its weights; 0: there are none.

    A chunk of rows is one parcel: all rows, all scales, then at a multiple of 4 all weights. In memory, parcels begin
    ``pitch`` bytes apart for each row, and nothing is sent of what is left over.
    """

    row: int
    scale: int
    weights: int
    pitch: int

    @classmethod
    def new(cls, row: int, scale: int, weights: int) -> RowWidths:
        """Return these widths."""
        return cls(row, scale, weights, _aligned(row + scale + weights))

    @classmethod
    def of(cls, kind: RowKind) -> RowWidths:
        """Return those of a kind of rows."""
        return cls.new(kind.row_bytes, kind.scale_bytes, _WEIGHT_BYTES * kind.top_k if kind.weighted else 0)


class Step(NamedTuple):
    """One of several exchanges of a call.

    Attributes:
        to: The node to send to.
        source: The node to receive from.
    """

    to: int
    source: int


@dataclass(frozen=True, slots=True)
class Chunks:
    """In which chunks tokens cross in one of the steps of a call; in any other step all cross in one.

    They are the same on all ranks: each is passed on by kernels of all ranks of a node, whichever of them has tokens in
    it.

    Attributes:
        to: The node to which tokens go in chunks.
        source: The one from which they come so.
        firsts: The first token of each chunk; the last one has all from there on.
        table: The same, with zeros to the end, for kernels.
        num: Their number.
    """

    to: int
    source: int
    firsts: tuple[int, ...]
    table: tuple[int, ...]
    num: int

    @classmethod
    def new(cls, step: Step, firsts: tuple[int, ...]) -> Chunks:
        """Return the chunks of a step, whose first tokens are given."""
        assert len(firsts) <= RAIL_CHUNKS
        return cls(*step, firsts, firsts + (0,) * (RAIL_CHUNKS - len(firsts)), len(firsts))

    @classmethod
    def of(cls, steps: Sequence[Step], expected: Expected, row_bytes: int, *, back: bool) -> Chunks:
        """Return those for rows of so many bytes, or with ``back`` for sums that go back where tokens came from.

        Rows are passed on when they have come: the last step ends with short chunks. Sums are added up before they go:
        the first step begins with them.
        """
        firsts = tuning.rail_chunks(expected.tokens, row_bytes, expected.ranks_per_node)
        return cls.new(steps[0 if back else -1], firsts)


class Expected(NamedTuple):
    """The expected traffic, by which rows are cut into chunks.

    Attributes:
        tokens: Tokens of a rank for the same other node; see `tokenferry.tuning.tokens_for_node`.
        ranks_per_node: Ranks of a node, G.
    """

    tokens: int
    ranks_per_node: int


class Chunk(NamedTuple):
    """Some of the tokens that cross between two ranks.

    Attributes:
        node: The node that they go to, or come from.
        first: The first of them.
        num: How many there are.
        at: Where their parcel begins, from the beginning of those for all nodes.
        num_bytes: Bytes of the parcel.
    """

    node: int
    first: int
    num: int
    at: int
    num_bytes: int

    @classmethod
    def of(cls, node: int, tokens: range, row: int, widths: RowWidths) -> Chunk:
        """Return a chunk.

        Args:
            node: The node.
            tokens: Its tokens among those for this node, or from there.
            row: The first row of this node among those of all nodes.
            widths: Bytes of what crosses.
        """
        row_bytes, scale_bytes, weight_bytes, pitch = widths
        first, num = tokens.start, len(tokens)
        if not num:
            return cls(node, 0, 0, row * pitch, 0)
        num_bytes = num * (row_bytes + scale_bytes)
        if weight_bytes:
            num_bytes += -num_bytes % _WEIGHT_BYTES + num * weight_bytes
        return cls(node, first, num, (row + first) * pitch, num_bytes)


class Swap(NamedTuple):
    """An exchange of chunks with two ranks, and what is done inside of the node for what comes, or goes.

    Attributes:
        send: What is sent; it may have no tokens.
        recv: What comes; likewise. If neither has any, there is no exchange.
        number: Number of both chunks.
        used: Whether any rank of the own node may have tokens of other nodes in a chunk of this number.
        whole: Whether it has all tokens of its step on all ranks of the own node.
    """

    send: Chunk
    recv: Chunk
    number: int
    used: bool
    whole: bool


class RoutingParcels:
    """The routing for all other nodes, or from there, one parcel for each, as ``dispatch_rails/parcels.cuh`` says.

    A parcel is the numbers of its tokens, then their experts in 16 bits. It begins at a multiple of 16 bytes.

    Args:
        tokens: Tokens that cross, by node.
        node: The own node, whose tokens do not.
        top_k: Experts of a token, K.

    Attributes:
        num_bytes: Bytes of the memory for all of them.
    """

    def __init__(self, tokens: Sequence[int], node: int, top_k: int) -> None:
        self._parcels: list[tuple[int, int, int]] = []
        self.num_bytes, first, token_bytes = 0, 0, routing_bytes(top_k)
        for m, num in enumerate(tokens):
            if m == node:
                continue
            before, num_bytes = first * token_bytes, num * token_bytes
            at = before - before % _ALIGNMENT + _ALIGNMENT * len(self._parcels)
            self._parcels.append((at, num_bytes, m))
            first += num
            self.num_bytes = at + num_bytes

    def parts(self, start: int, *, is_sent: bool) -> list[Part]:
        """Return the parts of an exchange of those that are not empty; ``start``: where the parcels begin."""
        return [(start + at, num_bytes, node, is_sent) for at, num_bytes, node in self._parcels if num_bytes]


def routing_bytes(top_k: int) -> int:
    """Return the bytes of the routing of a token that crosses."""
    return _TOKEN_BYTES + top_k * _ID_BYTES


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
