"""Reports of eager calls: wall clock and host time of each library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenferry.bench.report.plots import Bars
from tokenferry.bench.report.tables import Shown, Table, dash, with_percentiles

if TYPE_CHECKING:
    from tokenferry.bench.report.report import Report

Item = dict[str, Any]

MODES = (
    "wall clock of the host until results are complete. isolated: the ranks are synchronised and the device is idle "
    "before each call. back to back: calls without a pause, then one wait; the time of all over their number. host: "
    "until the call returns, back to back, T up to 128"
)
LIBRARIES = (
    "Buffer: tokenferry.compat.deep_ep.Buffer; a dispatch includes get_dispatch_layout. "
    "async_finish: every call waits for an event and returns one, as training frameworks call. "
    "all_to_all_single: with the exchange of counts, the wait for them, and the permutations around it; in the "
    "decode pair its rows are FP8 already, and one comes back from each rank"
)
CHECKED = (
    "every row of a dispatch and every sum bit-equal (all_to_all_single: sums within rounding), before timing and after"
)

HEADER = ("call", "rows", "T", "library", "isolated us", "back to back us", "host us", "x torch.empty(8)")
SHORT_HEADER = ("call", "rows", "T", "tokenferry", "Buffer", "all_to_all_single", "over tokenferry", "over Buffer")
BASELINE = "all_to_all_single"


def line(item: Item) -> str:
    """Return one case as a line."""
    what = f"{item['library']}: {item['call']}, {item['rows']}, T={item['tokens']}"
    times = f"{item['isolated']['median_us']:.1f} us isolated, {item['back_to_back']['median_us']:.1f} back to back"
    return f"{what}: {times}" + ("" if item["host_us"] is None else f", {item['host_us']:.1f} of the host")


def rows(items: Sequence[Item], empty_us: float | None) -> list[list[str]]:
    """Return rows under `HEADER`: the libraries of a call below one another."""
    table = []
    for (call, kind, tokens), libraries in _by_call(items).items():
        for library, item in libraries.items():
            host_us = item["host_us"]
            ratio = None if host_us is None or not empty_us else host_us / empty_us
            cells = [call, kind, str(tokens), library]
            cells += [with_percentiles(item[mode]) for mode in ("isolated", "back_to_back")]
            table.append([*cells, dash(host_us, ".1f"), dash(ratio, ".1f")])
    return table


def short_rows(items: Sequence[Item]) -> list[list[str]]:
    """Return rows under `SHORT_HEADER`: medians beside one another, and those of the baseline over ours."""
    table = []
    for (call, kind, tokens), libraries in _by_call(items).items():
        medians = {name: item["back_to_back"]["median_us"] for name, item in libraries.items()}
        ours, shim, theirs = (medians.get(name) for name in ("tokenferry", "Buffer", BASELINE))
        ratios = [theirs / us if theirs and us else None for us in (ours, shim)]
        cells = [call, kind, str(tokens), *(dash(us, ".1f") for us in (ours, shim, theirs))]
        table.append([*cells, *(dash(ratio, ".2f") for ratio in ratios)])
    return table


def bars(items: Sequence[Item]) -> list[Bars]:
    """Return what a picture shows: for each T the calls that several libraries have, back to back."""
    parts: dict[int, dict[str, dict[str, float]]] = {}
    for (call, kind, tokens), libraries in _by_call(items).items():
        if len(libraries) > 1:
            medians = {library: item["back_to_back"]["median_us"] for library, item in libraries.items()}
            parts.setdefault(tokens, {})[f"{call}, {kind.upper()}"] = medians
    return [Bars(f"T={tokens}", "us", groups) for tokens, groups in sorted(parts.items())]


def show(report: Report) -> Shown:
    """Show the times of each library, and what they mean."""
    items, empty_us = report.items("eager"), report.empty_us
    if not items:
        return
    yield Table("eager calls, wall clock, median us (5th-95th percentile)", HEADER, rows(items, empty_us))
    yield Table("back to back, median us", SHORT_HEADER, short_rows(items))
    yield MODES
    yield LIBRARIES
    yield f"checked: {CHECKED}"
    if empty_us is not None:
        yield f"torch.empty(8) on the same device: {empty_us:.2f} us"
    if report.settings.default_device:
        yield "all but torch.empty(8) with the device as torch's default device"


def _by_call(items: Sequence[Item]) -> dict[tuple[str, str, int], dict[str, Item]]:
    """Group items by call, rows and T, in the order of their first appearance and by T; the baseline has one name."""
    order: dict[tuple[str, str], int] = {}
    groups: dict[tuple[str, str, int], dict[str, Item]] = {}
    for item in items:
        call = item["call"], item["rows"]
        order.setdefault(call, len(order))
        library = item["library"] if item["library"] in ("tokenferry", "Buffer") else BASELINE
        groups.setdefault((*call, item["tokens"]), {})[library] = item
    return {key: groups[key] for key in sorted(groups, key=lambda key: (order[key[:2]], key[2]))}
