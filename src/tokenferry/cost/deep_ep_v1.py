"""The same decode calls by DeepEP's V1 low-latency mode, for comparison: its bytes, and what it recommends as memory.

V1 sends one copy of a token for each of its K choices, all over the network to where the expert is.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenferry.cost.case import Case, Links


@dataclass(frozen=True, slots=True)
class LowLatency:
    """What V1 moves for M tokens a rank.

    Attributes:
        network_copies: Copies that a rank sends to other nodes, on average.
        dispatch_us: The time of their bytes alone in a dispatch.
        combine_us: The same in a combine.
        buffer_bytes: The result of ``get_low_latency_rdma_size_hint``, the same for any number of ranks.
    """

    network_copies: float
    dispatch_us: float
    combine_us: float
    buffer_bytes: int


def low_latency(case: Case, links: Links) -> LowLatency:
    """Return what V1 moves: ``K * (1 - 1/N)`` copies a token, over all source nodes, for any gate. Pure."""
    copies = case.shape.max_tokens * case.shape.top_k * (1 - 1 / case.cluster.num_nodes)
    return LowLatency(
        copies,
        copies * case.dispatch_row_bytes / links.network_gbs / 1e3,
        copies * case.combine_row_bytes / links.network_gbs / 1e3,
        _size_hint(case),
    )


def _size_hint(case: Case) -> int:
    shape, line = case.shape, 128
    scale_bytes = shape.hidden // 128 * 4
    dispatch_row = 16 + max(2 * shape.hidden, shape.hidden + scale_bytes)
    combine_row = scale_bytes + 2 * shape.hidden
    sent = max(shape.max_tokens * dispatch_row, shape.num_experts * shape.max_tokens * combine_row)
    received = shape.num_experts * shape.max_tokens * max(dispatch_row, combine_row)
    flags = -(-4 * shape.num_experts // line) * line
    return (2 * (sent + received + flags) + line) // line * line
