"""Reports of training steps of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenferry.bench.report.tables import Shown, Table, differences, in_ms
from tokenferry.bench.suites.language import OURS, OWN

if TYPE_CHECKING:
    from tokenferry.bench.report.report import Report

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
        us = item["back_to_back"]["median_us"]
        cells = [item["experts"], item["dtype"], str(item["tokens"]), in_ms(item["isolated"])]
        cells += [in_ms(item["back_to_back"]), f"{item['ranks'] * item['tokens'] / us * 1e6:.0f}"]
        table.append([*cells, f"{us / own[item['tokens']]:.2f}"])
    return table


def show(report: Report) -> Shown:
    """Show the times of both models, and how far their results are apart."""
    items = report.items("language")
    if items:
        yield Table("a training step of a language model, medians (5th-95th percentile)", HEADER, rows(items))
        yield NOTE
    for item in report.items("language results"):
        yield f"{OURS} and {OWN}, products in {item['dtype']}, T={item['tokens']}, {differences(item)}"
