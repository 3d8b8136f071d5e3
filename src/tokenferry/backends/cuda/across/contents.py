"""What crosses between nodes in a call, and the memory that it lies in."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tokenferry.backends.cuda.across.rails import Parts, Transfer
from tokenferry.backends.cuda.across.relay import Relay
from tokenferry.kernels.control_block import RAIL_WORDS

STATE_BYTES = 8
"""Bytes of the state of a chunk."""


HEADER_BYTES = 4 * RAIL_WORDS
"""Bytes of the header that a rank sends to a rail peer."""


class Words(NamedTuple):
    """The headers and states that a rank and its rail peers send each other in a call, besides rows.

    The first kernel of a call sets `headers` to zeros, and states to `NOTHING_CAME`. They stay so if an exchange is
    given up, which ends like any other, so that data that never came is not taken for valid.

    Attributes:
        memory: Keeps them.
        mine: Address of ``[N, RAIL_WORDS]`` int32: the headers for the rail peers, sent in the first exchange.
        headers: Likewise those that come from them.
        states: Address of ``[N, chunks, 2]`` int32: their states when they sent a chunk.
        chunks: Chunks of a node.
    """

    memory: Tensor
    mine: int
    headers: int
    states: int
    chunks: int


class Opening(NamedTuple):
    """What a call along a plan says before its rows, in the exchange that brings the first of them.

    Attributes:
        words: What the rail peers say about it.
        goes: Address of ``[N]`` int32: rows for each node along the plan of this rank; 0: there is none.
        comes: The same of rows from there.
        src_counts: Address of `Plan.src_counts`, -1 if the plan was aborted.
        transfer: The exchange that brings what the others say, if it is one of its own; None: it is that of the rows.
    """

    words: Words
    goes: int
    comes: int
    src_counts: int
    transfer: Transfer | None


class CrossingRouting(NamedTuple):
    """The routing of all tokens that a rank passes on, its own included, and of those that it sends to other nodes.

    Attributes:
        memory: Holds all of it.
        ids: Address of ``[N, segment, K]``: their experts on this node; -1 in the padding of segments.
        id_bytes: Bytes of the experts of a token.
        tokens: Address of the numbers of the tokens from other nodes, on the ranks that they come from.
        parcels: Where the parcels with both come, which `dispatch_relay` lays out.
        parts: What of it crosses, with places in the memory, which begins with ``ids``, for addresses.
        relay: How much that is.
    """

    memory: Tensor
    ids: int
    id_bytes: int
    tokens: int
    parcels: int
    parts: Parts
    relay: Relay
