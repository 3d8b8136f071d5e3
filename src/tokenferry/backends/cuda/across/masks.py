"""Masks of a CUDA group of several nodes whose messages are put: see `tokenferry.backends.cuda.masks`.

A rank finds out by itself which ranks of its node are lost, as in a group of one node, and which of its rail peers
(`rail_receive`). A masked rank passes nothing on: rows that would go through a masked rail peer reach no rank of that
node. That takes no agreement: each of two rail peers that do not reach each other leaves out the rows between it and
the other one's node.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from tokenferry.backends.cuda.across.puts import Puts
from tokenferry.backends.cuda.context import Context
from tokenferry.backends.cuda.control import write_field
from tokenferry.backends.cuda.decode import Decoding
from tokenferry.backends.cuda.masks import Masks
from tokenferry.kernels.control_block import CONTROL_BLOCK_OFFSETS, NODE_WORDS
from tokenferry.memory.tensor import tensor_at
from tokenferry.topology import Topology


class AcrossMasks(Masks):
    """The masks of one rank; ranks are those of the whole group.

    Args:
        context: Context of this rank, in its node.
        decoder: Decode calls of this rank.
        topology: The nodes.
        puts: Exchanges with the rail peers.
    """

    def __init__(self, context: Context, decoder: Decoding, topology: Topology, puts: Puts) -> None:
        super().__init__(context, decoder)
        self._rank = topology.rank
        self._topology = topology
        self._puts = puts
        self._first = topology.nodes[topology.node][0]

    def ranks(self) -> frozenset[int]:
        """Return the ranks that decode calls skip."""
        return self._puts.masked_ranks()

    def write(self, out: Tensor) -> None:
        """Set ``out`` ``[R]`` int32 to 1 for each masked rank and 0 for the others, behind all calls so far."""
        at, context = self._topology, self._context
        out.zero_()
        super().write(out[self._first : self._first + context.num_ranks])
        words = tensor_at(
            context.window.base + CONTROL_BLOCK_OFFSETS["masked_nodes"],
            (NODE_WORDS,),
            torch.int32,
            context.device,
            context.window,
        )
        nodes = torch.arange(at.num_nodes, dtype=torch.int64, device=context.device)
        across = torch.bitwise_right_shift(words[nodes // 32], (nodes % 32).int()) & 1
        for rank in self._puts.by_hand:
            out[rank] = 1
        for node, rank in enumerate(at.rail):
            if node != at.node:
                out[rank] = across[node]

    def _mask(self, rank: int) -> None:
        if self._is_inside(rank):
            super()._mask(rank - self._first)
        else:
            self._puts.by_hand.add(rank)

    def _unmask(self, rank: int) -> bool:
        if self._is_inside(rank):
            return super()._unmask(rank - self._first)
        lost = False
        if rank in self._topology.rail:
            node = self._topology.rail.index(rank)
            lost, self._puts.lost[node] = self._puts.lost[node] != 0, 0
        self._puts.by_hand.discard(rank)
        return lost

    def _is_inside(self, rank: int) -> bool:
        return 0 <= rank - self._first < self._context.num_ranks

    def _publish_mask(self) -> None:
        super()._publish_mask()
        masked, at = self.ranks(), self._topology
        bits = sum(1 << node for node in range(at.num_nodes) if node != at.node and at.rail[node] in masked)
        words = struct.pack(f"<{NODE_WORDS}I", *((bits >> 32 * i) & 0xFFFFFFFF for i in range(NODE_WORDS)))
        write_field(self._context.window, "masked_nodes", words)

    def _resynchronise(self) -> None:
        super()._resynchronise()
        self._puts.resynchronise()
        self._wait_for_device()
