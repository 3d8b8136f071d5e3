"""What crosses between nodes in a call, and in which parcels: one operation of NCCL moves each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tokenferry import tuning
from tokenferry.backends.cuda.across.rails import Part
from tokenferry.backends.cuda.launch import RowKind

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


@dataclass(frozen=True, slots=True)
class Chunks:
    """In how many chunks the tokens for a node cross, and the most of each: the same on all ranks.

    Each is passed on by kernels of all ranks of a node, whichever of them has tokens in it.
    """

    num: int
    size: int

    @classmethod
    def of(cls, max_tokens: int, row_bytes: int) -> Chunks:
        """Return those for rows of so many bytes, in a group of M tokens a rank."""
        return cls(*tuning.rail_chunks(max_tokens, row_bytes))


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
    def of(cls, node: int, number: int, num_tokens: int, row: int, chunks: Chunks, widths: RowWidths) -> Chunk:
        """Return a chunk: the last one takes what goes beyond M.

        Args:
            node: The node.
            number: Number of the chunk.
            num_tokens: Tokens in all chunks.
            row: The first of them among the tokens for all nodes.
            chunks: In which chunks they cross.
            widths: Bytes of what crosses.
        """
        row_bytes, scale_bytes, weight_bytes, pitch = widths
        first = number * chunks.size
        num = num_tokens - first if number == chunks.num - 1 else min(num_tokens - first, chunks.size)
        if num <= 0:
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
        whole: Whether that is so of the first one only: it has all tokens.
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
