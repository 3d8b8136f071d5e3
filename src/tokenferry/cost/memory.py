"""The memory that calls across nodes take on each rank."""

from __future__ import annotations

from dataclasses import dataclass

from tokenferry.cost.calls import entry_bytes, slot_header_bytes, slot_weight_bytes
from tokenferry.cost.case import Case
from tokenferry.cost.rows import RankRows
from tokenferry.layout import network_capacity

_PARITIES = 2  # decode calls alternate between two sets of buffers


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        network_bytes: Buffers of the rails, for rows packed to be sent and rows that have arrived, and their routing:
            room for any routing.
        expected_rows_bytes: The rows that one dispatch delivers to the busiest rank.
        worst_rows_bytes: The rows that it delivers if all tokens need this rank.
    """

    network_bytes: int
    expected_rows_bytes: float
    worst_rows_bytes: int


def throughput_memory(case: Case, most: RankRows) -> Memory:
    """Return the memory of throughput calls: room for any routing within ``max_nodes``. Pure.

    Dispatch sends from the smaller buffer and receives in the larger one; combine uses them the other way round.
    """
    most_rows = network_capacity(case.group_shape, case.cluster.num_nodes)
    row_bytes = max(case.dispatch_row_bytes, case.combine_row_bytes)
    return _memory(case, most, (most_rows.sent + most_rows.received) * (row_bytes + entry_bytes(case)))


def decode_memory(case: Case, most: RankRows, slots: int) -> Memory:
    """Return the memory of decode calls: slots to send and to receive, for both calls and both parities. Pure."""
    slot_bytes = case.dispatch_row_bytes + slot_header_bytes(case) + case.combine_row_bytes + slot_weight_bytes(case)
    return _memory(case, most, _PARITIES * 2 * (case.cluster.num_nodes - 1) * slots * slot_bytes)


def _memory(case: Case, most: RankRows, network_bytes: int) -> Memory:
    worst = case.cluster.num_ranks * case.shape.max_tokens
    return Memory(network_bytes, most.received * case.dispatch_row_bytes, worst * case.dispatch_row_bytes)
