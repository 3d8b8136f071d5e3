"""The memory that calls across nodes take on each rank, from torch, while they run."""

from __future__ import annotations

from dataclasses import dataclass

from tokenferry.cost.calls import sent_slots, slot_header_bytes, slot_weight_bytes
from tokenferry.cost.case import Case
from tokenferry.cost.rows import RankRows
from tokenferry.layout import network_capacity

_PARITIES = 2  # two decode calls may be under way
_WEIGHT_BYTES = 4
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one rank.

    The first three are for rows that are about to cross and rows that have come from other nodes, of the call that
    takes most. Decode calls take the same in each case: slots, used or not.

    Attributes:
        network_bytes: With counts on the host: for the rows that cross.
        worst_network_bytes: With counts on the host: for the most rows that may cross, which ``max_nodes`` bounds.
        fixed_network_bytes: With counts on the device: M rows to and from each other node, whatever ``max_nodes``.
        expected_rows_bytes: The rows that one dispatch delivers to the busiest rank.
        worst_rows_bytes: The rows that it delivers if all tokens need this rank.
    """

    network_bytes: float
    worst_network_bytes: float
    fixed_network_bytes: float
    expected_rows_bytes: float
    worst_rows_bytes: int


def throughput_memory(case: Case, most: RankRows) -> Memory:
    """Return the memory of throughput calls. Pure.

    Args:
        case: The calls.
        most: The rows on the busiest rank.
    """
    shape, others = case.shape, case.cluster.num_nodes - 1
    worst = network_capacity(case.group_shape, case.cluster.num_nodes)
    fixed = 2 * shape.max_tokens * others
    return _memory(
        case,
        most,
        rows_under_way(case, most.network_out + most.network_in),
        rows_under_way(case, worst.sent + worst.received),
        rows_under_way(case, fixed),
    )


def rows_under_way(case: Case, num_rows: float) -> float:
    """Return the bytes of rows that go to and come from other nodes in a call, the larger one of both. Pure.

    A row of a dispatch has its scales and weights with it. In a combine there are also the sums of the own node.
    """
    if case.cluster.num_nodes == 1:
        return 0
    dispatch = num_rows * _pitch(case.dispatch_row_bytes + _WEIGHT_BYTES * case.shape.top_k)
    return max(dispatch, (num_rows + case.shape.max_tokens) * _pitch(case.combine_row_bytes))


def decode_memory(case: Case, most: RankRows, slots: int) -> Memory:
    """Return the memory of decode calls: slots to send and to receive, for both calls, of which two are under way.

    Pure.
    """
    slot_bytes = case.dispatch_row_bytes + slot_header_bytes(case) + case.combine_row_bytes + slot_weight_bytes(case)
    num_bytes = _PARITIES * 2 * (case.cluster.num_nodes - 1) * sent_slots(slots) * slot_bytes
    return _memory(case, most, num_bytes, num_bytes, num_bytes)


def _pitch(row_bytes: int) -> int:
    """Return how far apart rows under way lie."""
    return -(-row_bytes // _ALIGNMENT) * _ALIGNMENT


def _memory(case: Case, most: RankRows, network: float, worst: float, fixed: float) -> Memory:
    rows = case.cluster.num_ranks * case.shape.max_tokens
    return Memory(network, worst, fixed, most.received * case.dispatch_row_bytes, rows * case.dispatch_row_bytes)
