"""What crosses between nodes in a call: rows in chunks, and the parcel in which each of them lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tokenferry import tuning
from tokenferry.backends.cuda.launch import RowKind

_ALIGNMENT = 16
_WEIGHT_BYTES = 4


class RowWidths(NamedTuple):
    """Bytes of a row, of its scales and of its weights; 0: there are none.

    A chunk of rows is one parcel: all rows, all scales, then at a multiple of 4 all weights. So NCCL moves it by one
    operation. In memory, parcels begin ``pitch`` bytes apart for each row, and nothing is sent of what is left over.
    """

    row: int
    scale: int
    weights: int
    pitch: int

    @classmethod
    def new(cls, row: int, scale: int, weights: int) -> RowWidths:
        """Return these widths."""
        return cls(row, scale, weights, -(-(row + scale + weights) // _ALIGNMENT) * _ALIGNMENT)

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
