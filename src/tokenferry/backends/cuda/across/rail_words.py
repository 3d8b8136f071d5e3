"""What the ranks of a rail tell each other in a decode call besides rows, in one tensor."""

from __future__ import annotations

import torch

from tokenferry.backends.cuda.across.rails import Rows
from tokenferry.kernels.control_block import RAIL_WORDS


class RailWords:
    """Words of one call, which its first kernel writes.

    Args:
        num_nodes: N.
        device: Their device.

    Attributes:
        memory: Holds all of them.
        mine: ``[N, RAIL_WORDS]`` int32: what the ranks across from this one get to know.
        came: The same from them; zeros where nothing has come.
        states: ``[N, 2]`` int32: their states when they sent rows; `NOTHING_CAME` where nothing has come.
        overflows: Address of ``[N]`` int32: tokens for one other node, where they were too many; else 0.
        since: Address of an int64: when the stream began to wait for them, if somebody counts.
    """

    def __init__(self, num_nodes: int, device: torch.device) -> None:
        header = num_nodes * RAIL_WORDS
        self.memory = torch.empty(2 + 2 * header + 3 * num_nodes, dtype=torch.int32, device=device)
        self.since = at = self.memory.data_ptr()
        self.mine = Rows(at + 8, 4 * RAIL_WORDS)
        self.came = Rows(self.mine.at(num_nodes), 4 * RAIL_WORDS)
        self.states = Rows(self.came.at(num_nodes), 8)
        self.overflows = self.states.at(num_nodes)
