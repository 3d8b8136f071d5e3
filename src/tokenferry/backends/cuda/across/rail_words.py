"""What the ranks of a rail tell each other in a decode call besides rows, in one tensor."""

from __future__ import annotations

import torch

from tokenferry.backends.cuda.across.rails import Rows
from tokenferry.kernels.control_block import RAIL_WORDS
from tokenferry.memory.empty import Empty


class RailWords:
    """Words of one call, which its first kernel writes.

    Args:
        num_nodes: N.
        empty: Makes tensors on their device.

    Attributes:
        memory: Holds all of them.
        mine: ``[N, RAIL_WORDS]`` int32: what the ranks across from this one get to know.
        came: The same from them; zeros where nothing has come.
        states: ``[N, 2]`` int32: their states when they sent rows; `NOTHING_CAME` where nothing has come.
        overflows: Address of ``[N]`` int32: tokens for one other node, where they were too many; else 0.
        since: Address of an int64: when the stream began to wait for them, if somebody counts.
    """

    __slots__ = ("came", "memory", "mine", "overflows", "since", "states")

    def __init__(self, num_nodes: int, empty: Empty) -> None:
        header = num_nodes * RAIL_WORDS
        self.memory = empty((2 + 2 * header + 3 * num_nodes,), (1,), torch.int32)
        self.since = at = self.memory.data_ptr()
        came = at + 8 + 4 * header
        states = came + 4 * header
        self.mine, self.came = Rows(at + 8, 4 * RAIL_WORDS), Rows(came, 4 * RAIL_WORDS)
        self.states, self.overflows = Rows(states, 8), states + 8 * num_nodes
