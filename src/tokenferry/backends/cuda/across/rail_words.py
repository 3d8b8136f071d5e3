"""What the ranks of a rail send each other in a decode call besides rows."""

from __future__ import annotations

from typing import NamedTuple

from tokenferry.kernels.control_block import RAIL_WORDS


class RailWords(NamedTuple):
    """Where the words of one call lie, in bytes from the beginning of the memory that it takes; its kernels write them.

    Attributes:
        since: An int64: when the stream began to wait for them, if waits are counted.
        mine: ``[N, RAIL_WORDS]`` int32: the headers for the rail peers.
        came: Likewise those from them; zeros where nothing has come.
        states: ``[N, 2]`` int32: their states when they sent rows; `NOTHING_CAME` where nothing has come.
        overflows: ``[N]`` int32: tokens for one other node, where they were too many; else 0.
        num_bytes: Where they end.
    """

    since: int
    mine: int
    came: int
    states: int
    overflows: int
    num_bytes: int

    @classmethod
    def of(cls, num_nodes: int) -> RailWords:
        """Return those of calls across so many nodes."""
        mine = 8
        came = mine + 4 * num_nodes * RAIL_WORDS
        states = came + 4 * num_nodes * RAIL_WORDS
        overflows = states + 8 * num_nodes
        return cls(0, mine, came, states, overflows, overflows + 4 * num_nodes)
