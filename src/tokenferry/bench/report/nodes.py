"""Reports of calls across nodes: their times beside each leg alone, and what crossed the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenferry.bench.report.tables import with_percentiles

Item = dict[str, Any]

HEADER = (
    "call",
    "T",
    "rows across",
    "MB across",
    "whole us",
    "between nodes us",
    "within a node us",
    "over slower leg",
)
NOTE = (
    "whole: ranks synchronised before each call, the slowest rank's time. The legs alone, in turns with it: the same "
    "rows in groups of one node, along a rail and inside a node. rows across: rows that a rank sends to other nodes, "
    "mean over ranks; MB: their data, without ids, weights and headers"
)
CHECKED = (
    "rows bit-equal to those of one node, sums within rounding; as many rows crossed as there are pairs of a token and "
    "another node that it goes to"
)
LOOPBACK = (
    "Between nodes the rows take TCP on this machine's loopback: this shows bytes and overlap, not rates of a network"
)


def line(item: Item) -> str:
    """Return one case as a line."""
    return f"{item['nodes']}: {item['call']}, T={item['tokens']}: {item['whole']['median_us']:.1f} us"


def rows(items: Sequence[Item]) -> list[list[str]]:
    """Return rows under `HEADER`."""
    table = []
    for item in items:
        slower = max(item["network"]["median_us"], item["inside"]["median_us"])
        across = item["rows_across"]
        cells = [item["call"], str(item["tokens"]), f"{across:.1f}", f"{across * item['row_bytes'] / 1e6:.2f}"]
        cells += [with_percentiles(item[part]) for part in ("whole", "network", "inside")]
        table.append([*cells, f"{item['whole']['median_us'] / slower:.2f}"])
    return table
