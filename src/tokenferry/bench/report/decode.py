"""Reports of the decode phases: times beside the limit of the same run, tables, JSON, curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenferry.bench.report.tables import Shown, Table, dash, launch, with_percentiles
from tokenferry.bench.suites.limits import Limits

if TYPE_CHECKING:
    from tokenferry.bench.report.report import Report

Item = dict[str, Any]

CHECKED = (
    "dispatch: counts, source tokens, every row and scale bit-equal; combine: every sum bit-equal (logfmt10: within a "
    "code); eagerly and replayed, before timing and after, with new rows, routings and numbers of tokens"
)
LIMIT = (
    "bytes that leave the GPU with most, at the best rate of stores of this run, and for each of dispatch and combine "
    "one flag's way and one empty kernel of a graph"
)
HOOK = "+ hook: sent with a hook that is called at once: two kernels instead of one"

HEADER = (
    *("decode call", "T", "graph us", "limit us", "of limit", "graph + hook us", "isolated us", "launch"),
    *("eager us", "eager + hook us", "host us", "host + hook us", "KB out"),
)
TWO_BATCH_HEADER = (
    *("two-batch overlap", "T of each", "work is", "work us", "4 x work us", "calls us"),
    *("one after another us", "by hooks us", "hidden", "faster by"),
)
CURVES = ("dispatch FP8", "combine exact", "combine fast", "pair exact", "pair fast")
"""The calls in the picture."""


def limit_us(item: Item, limits: Limits | None, node_us: float | None, kernels: int = 1) -> float | None:
    """Return the least time of an iteration.

    Args:
        item: A case.
        limits: Limits of the links.
        node_us: Microseconds of an empty kernel in a graph.
        kernels: Kernels of each call.

    Returns:
        float | None: microseconds; None if a part of it was not measured.
    """
    if limits is None or node_us is None or not limits.rates:
        return None
    total = 0.0
    for message in item["messages"]:
        rate = limits.near("store", message["row_bytes"])
        if not rate:
            return None
        total += message["rows_most"] * message["row_bytes"] / rate / 1e3 + (limits.flag_us or 0.0) + kernels * node_us
    return total


def as_json(items: Sequence[Item], limits: Limits | None, node_us: float | None) -> list[Item]:
    """Return the cases with their limits."""
    whole = []
    for item in items:
        limit = limit_us(item, limits, node_us)
        fraction = None if limit is None else limit / item["graph"]["median_us"]
        hooked = limit_us(item, limits, node_us, kernels=2)
        whole.append({**item, "limit_us": limit, "of_limit": fraction, "limit_hook_us": hooked})
    return whole


def rows(items: Sequence[Item], limits: Limits | None, node_us: float | None) -> list[list[str]]:
    """Return rows under `HEADER`."""
    table = []
    for item in as_json(items, limits, node_us):
        cells = [item["call"], str(item["tokens"]), with_percentiles(item["graph"])]
        cells += [dash(item["limit_us"], ".1f"), dash(item["of_limit"], ".0%"), with_percentiles(item["graph_hook"])]
        cells += [with_percentiles(item["isolated"]), launch(item["ahead"])]
        cells += [with_percentiles(item["eager"]), with_percentiles(item["eager_hook"])]
        cells += [dash(item["host_us"], ".1f"), dash(item["host_hook_us"], ".1f")]
        sent = sum(message["rows"] * message["row_bytes"] for message in item["messages"])
        table.append([*cells, f"{sent / 1e3:.0f}"])
    return table


def two_batch_rows(items: Sequence[Item]) -> list[list[str]]:
    """Return rows under `TWO_BATCH_HEADER`."""
    return [
        [
            *(item["numerics"], str(item["tokens"]), item["work_is"], f"{item['piece_us']:.1f}"),
            *(with_percentiles(item[name]) for name in ("work", "calls", "serial", "hooks")),
            *(f"{item['hidden']:.0%}", f"{item['speedup'] - 1:.0%}"),
        ]
        for item in items
    ]


def show(report: Report) -> Shown:
    """Show the decode calls, and two-batch overlap."""
    cases, two_batch, node_us = report.items("decode"), report.items("two_batch"), report.node_us
    if cases:
        table = rows(cases, report.limits, node_us)
        yield Table("decode calls, median us (5th-95th percentile)", HEADER, table)
        yield f"M={cases[0]['max_tokens']}. KB out: {report.notes['bytes']}. {HOOK}"
        yield f"limit: {LIMIT}. of limit: of the graph's time"
        if node_us is not None:
            yield f"an empty kernel of a graph: {node_us:.2f} us"
        yield f"checked: {CHECKED}"
    if two_batch:
        yield Table("two-batch overlap, as CUDA graphs", TWO_BATCH_HEADER, two_batch_rows(two_batch))
        yield "hidden: (work alone + calls alone - by hooks) / calls alone"


def line(item: Item) -> str:
    """Return one case as a line."""
    hooked = "" if item["graph_hook"] is None else f" ({item['graph_hook']['median_us']:.1f} with hook)"
    graph = f"{item['graph']['median_us']:.1f} us in a graph{hooked}"
    rest = f"{item['isolated']['median_us']:.1f} isolated, {item['eager']['median_us']:.1f} eager"
    return f"decode: {item['call']}, T={item['tokens']}: {graph}, {rest}, {item['host_us']:.1f} of the host"


def two_batch_line(item: Item) -> str:
    """Return one case of two-batch overlap as a line."""
    times = f"{item['serial']['median_us']:.1f} us one after another, {item['hooks']['median_us']:.1f} by hooks"
    kind = f"{item['numerics']}, {item['work_is']} work"
    return f"two-batch overlap, {kind}: {times}, {item['hidden']:.0%} hidden"


def curves(
    items: Sequence[Item], limits: Limits | None, node_us: float | None
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, list[tuple[float, float]]]]:
    """Return the points (T, us) of the calls of `CURVES`, and of their limits."""
    times: dict[str, list[tuple[float, float]]] = {}
    floors: dict[str, list[tuple[float, float]]] = {}
    for item in as_json(items, limits, node_us):
        name, tokens = item["call"], float(item["tokens"])
        if name in CURVES:
            times.setdefault(name, []).append((tokens, item["graph"]["median_us"]))
            if item["limit_us"] is not None:
                floors.setdefault(f"limit: {name}", []).append((tokens, item["limit_us"]))
    return times, floors
