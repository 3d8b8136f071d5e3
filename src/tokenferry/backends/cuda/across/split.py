"""How many tokens of a rank go to each rank and each node: counted on the device, before anything is sent."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate
from tokenferry.backends.cuda.faults import pinned_words, view_words
from tokenferry.kernels.control_block import HOST_NODES_WORD, HOST_ROWS_WORD, RAIL_WORDS
from tokenferry.kernels.dispatch_notify.spec import num_units
from tokenferry.topology import Topology


class Split(NamedTuple):
    """The tokens of a rank, by rank and by node.

    Attributes:
        table: ``[units, R + N]`` int32, as `dispatch_split` leaves it.
        bases: ``[R + N]`` int32, likewise.
        headers: ``[N, RAIL_WORDS]`` int32: what the ranks across get to know.
        dst_counts: `Plan.dst_counts`.
    """

    table: Tensor
    bases: Tensor
    headers: Tensor
    dst_counts: Tensor


class SplitCounts(NamedTuple):
    """What the host knows of it.

    Attributes:
        went: Tokens for each node.
        num_sent: Rows for all ranks.
    """

    went: tuple[int, ...]
    num_sent: int


class Splitter:
    """Counts the tokens of one rank.

    Args:
        context: Context of this rank.
        topology: The nodes.
    """

    def __init__(self, context: Context, topology: Topology) -> None:
        self._context = context
        self._num_nodes = topology.num_nodes
        self._num_ranks = topology.num_ranks
        pin = context.device.type == "cuda"
        memory = pinned_words(HOST_NODES_WORD + topology.num_nodes, pin=pin)
        self._words, self._address = view_words(memory), memory.data_ptr()

    def split(self, template: LaunchTemplate, call: Call, topk_idx: Tensor, num_sms: int) -> Split:
        """Count; returns at once."""
        device, num_ranks, num_nodes = self._context.device, self._num_ranks, self._num_nodes
        num_tokens, columns = topk_idx.shape[0], num_ranks + num_nodes
        units = num_units(num_tokens)
        table = torch.empty(units, columns, dtype=torch.int32, device=device)
        bases = torch.empty(columns, dtype=torch.int32, device=device)
        headers = torch.empty(num_nodes, RAIL_WORDS, dtype=torch.int32, device=device)
        dst_counts = torch.empty(num_ranks, dtype=torch.int64, device=device)
        template.pack(
            0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
            topk_idx.data_ptr(), table.data_ptr(), bases.data_ptr(), dst_counts.data_ptr(), headers.data_ptr(),
            self._address, num_tokens,
        )  # fmt: skip
        template.launch(max(1, min(units, num_sms)), call.stream)
        return Split(table, bases, headers, dst_counts)

    def wait(self, call: Call) -> SplitCounts:
        """Wait for the counts of a call.

        Raises:
            RoutingError: an index is outside [-1, E); nothing has been sent.
            TokenferryError: the error of an earlier call.
        """
        self._context.wait_for_words(call, self._words)
        words = self._words.tolist()
        return SplitCounts(tuple(words[HOST_NODES_WORD:]), words[HOST_ROWS_WORD])
