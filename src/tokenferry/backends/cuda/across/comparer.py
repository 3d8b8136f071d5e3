"""Comparison of the headers of rail peers by the host, while the first exchange of a call is under way.

Kernels compare headers when the exchange has ended. But an exchange of two different calls may never end, because NCCL
compares no sizes.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch

from tokenferry.backends.cuda.context import Call
from tokenferry.backends.cuda.faults import FlightRecorder, Record
from tokenferry.errors import TokenferryError
from tokenferry.kernels.control_block import (
    DISPATCH_WORD,
    RAIL_SPACE_WORD,
    RAIL_WORDS,
    ROWS_WORD,
    SIGNATURE_WORDS,
    Fault,
)
from tokenferry.memory.tensor import tensor_at
from tokenferry.topology import Topology


class HeaderAddresses(NamedTuple):
    """Addresses of what the rail peers say about a call, and of what they should say.

    Attributes:
        headers: ``[N, RAIL_WORDS]`` int32: what they say; zeros where nothing has come.
        goes: See `Opening`; 0: the call follows no plan.
        comes: Likewise.
        src_counts: Likewise.
        epoch: The epoch of the dispatch whose rows a decode combine sends; 0: it is another call.
    """

    headers: int
    goes: int = 0
    comes: int = 0
    src_counts: int = 0
    epoch: int = 0


class Comparer:
    """Compares what the rail peers of a rank say. It does not keep the group alive, and outlives it in CUDA graphs.

    Args:
        device: The device of the rank.
        topology: The nodes.
        recorder: Knows the last calls.
    """

    def __init__(self, device: torch.device, topology: Topology, recorder: FlightRecorder) -> None:
        self._device = device
        self._node, self._num_nodes, self._rail = topology.node, topology.num_nodes, topology.rail
        self._recorder = recorder

    def compare(self, call: Call, at: HeaderAddresses) -> TokenferryError | None:
        """Return the error if a rail peer has made another call, as far as is known; see `Compare`."""
        headers, goes, comes, src_counts, epoch = at
        if src_counts and self._read(src_counts, 1, torch.int64)[0] < 0:
            return None  # the plan was aborted, and what follows from it is undefined
        expected = list(struct.unpack(f"<{SIGNATURE_WORDS}i", call.signature.words))
        if epoch:
            (expected[DISPATCH_WORD],) = self._read(epoch, 1)
        said = self._read(headers, self._num_nodes * RAIL_WORDS)
        here, there = (self._read(rows, self._num_nodes) if rows else [] for rows in (comes, goes))
        for node in range(self._num_nodes):
            words = said[node * RAIL_WORDS : (node + 1) * RAIL_WORDS]
            if node == self._node or not words[0]:  # no call has such a kind
                continue
            pairs = [(word, words[word], expected[word]) for word in range(SIGNATURE_WORDS)]
            if here:
                pairs += [
                    (ROWS_WORD, words[ROWS_WORD], here[node]),
                    (RAIL_SPACE_WORD, words[RAIL_SPACE_WORD], there[node]),
                ]
            for word, seen, wanted in pairs:
                if seen != wanted:
                    return self.mismatch(call, node, word, seen, wanted)
        return None

    def mismatch(self, call: Call, node: int, word: int, seen: int, expected: int) -> TokenferryError:
        """Return the error: a word from the rail peer on a node is not what this rank expected."""
        record = Record(Fault.node_mismatch, call.number, 0, word, seen, expected, self._rail[node], 0)
        return self._recorder.explain(record)

    def _read(self, address: int, num: int, dtype: torch.dtype = torch.int32) -> list[int]:
        found: list[int] = tensor_at(address, (num,), dtype, self._device, self).tolist()
        return found
