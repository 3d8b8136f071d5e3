"""Reports of training steps of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenferry.bench.suites.language import OURS, OWN

Item = dict[str, Any]

NOTE = (
    "a byte-level language model whose other parameters are spread by FSDP2: forward, backward, AdamW; wall clock. "
    f"{OURS}: experts in nn.MoELayer; {OWN}: the same experts, each choice of a token a row, and the host waits for "
    "counts. Both have the same weights and bytes. differ_by: norm of the difference over the norm, the worst rank"
)
HEADER = ("experts through", "products", "T", "isolated ms", "back to back ms", "tokens/s", f"over {OWN}")


def rows(items: Sequence[Item]) -> list[list[str]]:
    """Return rows under `HEADER`."""
    own = {item["tokens"]: item["back_to_back"]["median_us"] for item in items if item["experts"] == OWN}
    table = []
    for item in items:
        times = [
            f"{one['median_us'] / 1e3:.2f} ({one['p05_us'] / 1e3:.2f}-{one['p95_us'] / 1e3:.2f})"
            for one in (item["isolated"], item["back_to_back"])
        ]
        us = item["back_to_back"]["median_us"]
        speed = f"{item['ranks'] * item['tokens'] / us * 1e6:.0f}"
        table.append(
            [item["experts"], item["dtype"], str(item["tokens"]), *times, speed, f"{us / own[item['tokens']]:.2f}"]
        )
    return table


def difference_line(item: Item) -> str:
    """Return how far losses and gradients are from those through all_to_all_single."""
    found = ", ".join(f"{name} {by:.1e}" for name, by in item["differ_by"].items())
    what = f"{OURS} and {OWN}, products in {item['dtype']}, T={item['tokens']}"
    return f"{what}, norm of the difference over the norm: {found}"
