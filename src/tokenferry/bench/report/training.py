"""Reports of training steps of Megatron-Core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenferry.bench.report.plots import Bars
from tokenferry.bench.report.tables import Shown, Table, differences, in_ms
from tokenferry.bench.suites.megatron import OWN

if TYPE_CHECKING:
    from tokenferry.bench.report.report import Report

Item = dict[str, Any]

NOTE = (
    "two MoE layers of Megatron-Core with residual connections: forward, backward, SGD; wall clock. flex: over our "
    f"deep_ep, Buffer (deepep) or HybridEPBuffer (hybridep); {OWN}, allgather: its own. All have the same weights and "
    "rows. "
    "differ_by: norm of the difference over the norm, the worst rank"
)
HEADER = ("dispatcher", "rows", "T", "isolated ms", "back to back ms", f"over {OWN}")


def rows(items: Sequence[Item]) -> list[list[str]]:
    """Return rows under `HEADER`."""
    own = {item["tokens"]: item["back_to_back"]["median_us"] for item in items if item["dispatcher"] == OWN}
    table = []
    for item in items:
        times = [in_ms(item["isolated"]), in_ms(item["back_to_back"])]
        ratio = item["back_to_back"]["median_us"] / own[item["tokens"]]
        table.append([item["dispatcher"], item["dtype"], str(item["tokens"]), *times, f"{ratio:.2f}"])
    return table


def bars(items: Sequence[Item]) -> list[Bars]:
    """Return what a picture shows: for each T the step of each dispatcher, back to back."""
    parts: dict[str, dict[str, dict[str, float]]] = {}
    for item in items:
        title = f"a training step, T={item['tokens']}, {item['dtype']}"
        median_ms = item["back_to_back"]["median_us"] / 1e3
        parts.setdefault(title, {})[item["dispatcher"]] = {"back to back": median_ms}
    return [Bars(title, "ms", groups) for title, groups in parts.items()]


def _repeated(item: Item) -> str:
    """Return what of a step has other bits when it is repeated."""
    algorithms = "deterministic algorithms" if item["deterministic_algorithms"] else "torch's usual algorithms"
    found = f"other bits in {', '.join(item['changed'])}" if item["changed"] else "the same bits"
    return f"{item['dispatcher']} in {item['dtype']}, T={item['tokens']}, a step repeated with {algorithms}: {found}"


def show(report: Report) -> Shown:
    """Show how the dispatchers of Megatron-Core compare."""
    items = report.items("training")
    if items:
        yield Table("a training step, ms (5th-95th percentile)", HEADER, rows(items))
    for item in report.items("training results"):
        yield f"{item['dispatcher']} and {OWN} in {item['dtype']}, T={item['tokens']}, {differences(item)}"
    for item in report.items("training repeated"):
        yield _repeated(item)
