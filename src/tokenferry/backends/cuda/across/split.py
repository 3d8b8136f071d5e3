"""How many tokens of a rank go to each rank and each node: counted on the device, before anything is sent."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenferry.backends.cuda.across.contents import Words
from tokenferry.backends.cuda.across.crossing import Crossing
from tokenferry.backends.cuda.across.forms import AcrossForm
from tokenferry.backends.cuda.buffers import section_ends
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.faults import pinned_words, view_words
from tokenferry.kernels.codes import UNIT_TOKENS
from tokenferry.kernels.control_block import HOST_NODES_WORD, HOST_ROWS_WORD
from tokenferry.topology import Topology


class Split(NamedTuple):
    """The tokens of a rank, by rank and by node.

    Attributes:
        table: Address of ``[units, R + N]`` int32, as `dispatch_split` leaves it.
        bases: Address of ``[R + N]`` int32, likewise.
        words: What the rail peers get to know, and what they say, of which nothing has come yet. Its memory holds all
            but ``dst_counts``.
        dst_counts: `Plan.dst_counts`.
        rest: Address of the rest of the memory of ``words``.
    """

    table: int
    bases: int
    words: Words
    dst_counts: Tensor
    rest: int


class SplitCounts(NamedTuple):
    """What the host knows of it.

    Attributes:
        went: Tokens for each node.
        num_out: Those for all other nodes.
        num_sent: Rows for all ranks.
    """

    went: tuple[int, ...]
    num_out: int
    num_sent: int


class Splitter:
    """Counts the tokens of one rank.

    Args:
        context: Context of this rank.
        topology: The nodes.
        crossing: Exchanges with other nodes.
    """

    def __init__(self, context: Context, topology: Topology, crossing: Crossing) -> None:
        self._context = context
        self._crossing = crossing
        self._node, self._num_nodes = topology.node, topology.num_nodes
        self._num_ranks = topology.num_ranks
        pin = context.device.type == "cuda"
        memory = pinned_words(HOST_NODES_WORD + topology.num_nodes, pin=pin)
        self._words, self._address = view_words(memory), memory.data_ptr()

    def split(self, form: AcrossForm, call: Call, topk_idx: int, num_tokens: int, num_bytes: int) -> Split:
        """Count; returns at once. ``topk_idx``: its address; ``num_bytes``: of the rest."""
        # `num_units` is not called: each function counts in the host's time of a call.
        columns, units = self._num_ranks + self._num_nodes, -(-num_tokens // UNIT_TOKENS)
        bases_at, end = section_ends(4 * units * columns, 4 * columns)
        words, at = self._crossing.new_words(form.rows.chunks.num, end + num_bytes)
        split = Split(at, at + bases_at, words, self._new_counts(), at + end)
        form.split.pack(
            call.alive, call.number, call.signature.words,
            topk_idx, split.table, split.bases, split.dst_counts.data_ptr(), words.mine, words.headers,
            words.states, self._address, num_tokens,
        )  # fmt: skip
        form.split.launch(max(1, min(units, form.rows.sms.local)), call.stream)
        return split

    def _new_counts(self) -> Tensor:
        """Return ``[R]`` int64, never an inference tensor: it belongs to a plan."""
        if not torch.is_inference_mode_enabled():
            return self._context.empty((self._num_ranks,), (1,), torch.int64)
        with torch.inference_mode(False):
            return self._context.empty((self._num_ranks,), (1,), torch.int64)

    def wait(self, call: Call, num_tokens: int) -> SplitCounts:
        """Wait for the counts of a call, and take T for those of the own node.

        Raises:
            RoutingError: an index is outside [-1, E); nothing has been sent.
            TokenferryError: the error of an earlier call.
        """
        self._context.wait_for_words(call, self._words)
        words = self._words.tolist()
        went = words[HOST_NODES_WORD:]
        num_out = sum(went) - went[self._node]
        went[self._node] = num_tokens
        return SplitCounts(tuple(went), num_out, words[HOST_ROWS_WORD])
