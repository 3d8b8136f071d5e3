"""Reports of training steps of Megatron-Core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenferry.bench.suites.megatron import FLEX, OWN

Item = dict[str, Any]

NOTE = (
    f"two MoE layers of Megatron-Core with residual connections: forward, backward, SGD; wall clock. {FLEX}: over our "
    f"deep_ep; {OWN}: its own. Both have the same weights and rows. differ_by: norm of the difference over the norm, "
    "the worst rank"
)
HEADER = ("dispatcher", "rows", "T", "isolated ms", "back to back ms", f"over {OWN}")


def rows(items: Sequence[Item]) -> list[list[str]]:
    """Return rows under `HEADER`."""
    own = {item["tokens"]: item["back_to_back"]["median_us"] for item in items if item["dispatcher"] == OWN}
    table = []
    for item in items:
        times = [
            f"{one['median_us'] / 1e3:.2f} ({one['p05_us'] / 1e3:.2f}-{one['p95_us'] / 1e3:.2f})"
            for one in (item["isolated"], item["back_to_back"])
        ]
        ratio = item["back_to_back"]["median_us"] / own[item["tokens"]]
        table.append([item["dispatcher"], item["dtype"], str(item["tokens"]), *times, f"{ratio:.2f}"])
    return table


def difference_line(item: Item) -> str:
    """Return how far losses and gradients of the two dispatchers are apart."""
    found = ", ".join(f"{name} {by:.1e}" for name, by in item["differ_by"].items())
    return f"{FLEX} and {OWN} in {item['dtype']}, T={item['tokens']}, norm of the difference over the norm: {found}"
