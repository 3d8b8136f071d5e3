"""What crosses between nodes in a call, and the memory that it lies in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from tokenferry.backends.cuda.across.rails import Parcel, Rows, Transfer
from tokenferry.backends.cuda.across.relay import Relay
from tokenferry.kernels.control_block import RAIL_WORDS

STATE_BYTES = 8
"""Of the state of a chunk."""


HEADER_BYTES = 4 * RAIL_WORDS
"""Of what a rank says to another one."""


class Words(NamedTuple):
    """What ranks say in a call besides, and those across from this one say.

    An exchange that is given up ends as any other: `headers` stay zeros, and `NOTHING_CAME` stays in states, so that
    what it should have brought is not taken for good. The first kernel of a call writes them so.

    Attributes:
        memory: Keeps them.
        mine: ``[N, RAIL_WORDS]`` int32: what the ranks across get to know before anything else crosses.
        headers: The same from them.
        states: Address of ``[N, chunks, 2]`` int32: their states when they sent a chunk.
        chunks: Chunks of a node.
    """

    memory: Tensor
    mine: Rows
    headers: Rows
    states: int
    chunks: int


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


class Shares(NamedTuple):
    """What of the routing is for a node, and from it, from the beginning of its memory.

    Attributes:
        node: The node.
        send: Where the ids and the tokens for it lie, and their bytes; nothing, if there are none.
        recv: The same of those from there.
    """

    node: int
    send: tuple[Parcel, ...]
    recv: tuple[Parcel, ...]


class Routing(NamedTuple):
    """The routing of all tokens that a rank passes on, its own included, and of those that it sends to other nodes.

    Attributes:
        memory: Holds all of it.
        ids: ``[N, segment, K]``: their experts on this node; -1 in the padding of segments.
        tokens: Numbers of the tokens from other nodes, on the ranks that they come from.
        shares: What of it crosses.
        relay: How much that is.
    """

    memory: Tensor
    ids: Rows
    tokens: Rows
    shares: Sequence[Shares]
    relay: Relay
