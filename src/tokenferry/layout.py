"""The layout of messages, and the numbers of rows of results and of network buffers: arithmetic on sizes only.

A message about n rows consists of consecutive sections. Each section holds one fixed-width piece of every row and
starts at a multiple of 16 bytes, so that it can be viewed as its dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenferry.types import DispatchOptions, Layout, MoeShape

_ALIGN = 16


@dataclass(frozen=True, slots=True)
class Sections:
    """The pieces of a row, by their widths in bytes; a piece that is not sent has width 0."""

    widths: tuple[int, ...]

    def offsets(self, num_rows: int) -> list[int]:
        """Return the offset of each section, then the end of the last one, in bytes."""
        offsets = [0]
        for width in self.widths:
            offsets.append(offsets[-1] + -(-num_rows * width // _ALIGN) * _ALIGN)
        return offsets

    def num_bytes(self, num_rows: int) -> int:
        """Return the size in bytes of a message about ``num_rows`` rows."""
        return self.offsets(num_rows)[-1]

    def split(self, body: Tensor, num_rows: int) -> list[Tensor]:
        """View a message (uint8, 1-D) as one ``[num_rows, width]`` uint8 tensor per section."""
        starts = self.offsets(num_rows)
        return [
            body[start : start + num_rows * width].view(num_rows, width)
            for start, width in zip(starts, self.widths, strict=False)
        ]


@dataclass(frozen=True, slots=True)
class RowCapacity:
    """The number of rows that the results of a dispatch can hold.

    Attributes:
        worst: Rows that the worst-case routing needs (MASKED: per expert).
        given: Rows allocated (MASKED: per expert).
        received: N of the plan's tensors with ``counts="device"``, in (token, rank) rows.
        sent: Rows of ``Plan.dst_token`` with ``counts="device"``, per token of this rank.
    """

    worst: int
    given: int
    received: int
    sent: int

    @property
    def tight(self) -> bool:
        """Whether an overflow is possible."""
        return self.given < self.worst


@dataclass(frozen=True, slots=True)
class NetworkCapacity:
    """The most rows that any routing makes one rank exchange with other nodes.

    Attributes:
        sent: Rows that it sends in a dispatch, and gets back in a combine.
        received: Rows that it receives in a dispatch, and returns in a combine.
    """

    sent: int
    received: int


def network_capacity(shape: MoeShape, num_nodes: int) -> NetworkCapacity:
    """Return the most rows that may cross between a rank and other nodes, with counts on the host.

    A token crosses once for each other node that it goes to: at most K, at most ``max_nodes`` (none of them need be its
    own node), and at most all others. No such limit holds for a receiver: all tokens of its peers may go to its node.
    """
    others = num_nodes - 1
    reached = min(others, shape.top_k, others if shape.max_nodes is None else shape.max_nodes)
    return NetworkCapacity(shape.max_tokens * reached, shape.max_tokens * others)


def row_capacity(shape: MoeShape, options: DispatchOptions, num_ranks: int) -> RowCapacity:
    """Return the capacity of a dispatch on a group of R ranks."""
    num_local = shape.num_experts // num_ranks
    received = num_ranks * shape.max_tokens
    worst = received
    if options.layout is Layout.EXPERTS:
        rows = received * min(shape.top_k, num_local) + (options.alignment - 1) * num_local
        worst = -(-rows // options.alignment) * options.alignment
    given = worst if options.capacity is None else options.capacity
    if options.layout is Layout.ROWS:
        received = given
    return RowCapacity(worst, given, received, min(shape.top_k, num_ranks))
