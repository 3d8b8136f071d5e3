"""Results as rows of tables, and as lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenferry.bench.core.session import Label, Result
from tokenferry.bench.core.summary import Summary

if TYPE_CHECKING:
    from tokenferry.bench.report.report import Report

BASELINE_HEADER = (
    *("call", "mode", "median us", "p05", "p95"),
    *("gloo us", "gloo p05", "gloo p95", "ratio", "MB/rank", "GB/s"),
)
HEADER = (
    *("library", "call", "rows", "T", "SMs", "isolated us", "p05", "p95", "launch", "back to back us"),
    *("MB out", "GB/s", "of limit"),
)
SHORT_HEADER = (
    *("call", "rows", "T", "SMs", "isolated us", "launch", "back to back us", "of limit"),
    *("nccl isolated", "nccl back to back"),
)
OVERLAP_HEADER = (
    *("beside GEMMs", "SMs", "calls", "GEMMs by", "SMs left out", "first"),
    *("GEMMs us", "with SMs left out", "calls us", "both us", "hidden", "GEMMs slower by"),
)
HOST_HEADER = ("host time of an eager call", "median us", "least us")

ALWAYS = 0.9
"""From this part of the iterations on, something holds for the median and its percentiles."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table, to be printed."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


Shown = Iterator["Table | str"]
"""What is printed of results: tables, and lines below them."""


def ratios(result: Result) -> dict[str, float] | None:
    """Return the medians of a result over those of its baseline, by mode; None without one."""
    if result.baseline is None:
        return None
    return {
        "isolated": result.isolated.median_us / result.baseline.isolated.median_us,
        "back_to_back": result.back_to_back.median_us / result.baseline.back_to_back.median_us,
    }


def baseline_rows(results: Sequence[Result]) -> list[list[str]]:
    """Return rows under `BASELINE_HEADER`: two for each result, which all have a baseline."""
    rows = []
    for result in results:
        for mode, ratio in (ratios(result) or {}).items():
            ours, theirs = (getattr(times, mode) for times in (result, result.baseline))
            times = [f"{us:.0f}" for one in (ours, theirs) for us in (one.median_us, one.p05_us, one.p95_us)]
            moved = [f"{result.bytes_out / 1e6:.2f}", f"{result.bytes_out / ours.median_us / 1e3:.2f}"]
            rows.append([result.label.call, mode.replace("_", " "), *times, f"{ratio:.2f}", *moved])
    return rows


def result_line(result: Result) -> str:
    """Return one result as a line."""
    label = result.label
    sms = "" if label.num_sms is None else f", {label.num_sms} SMs"
    routing = "" if label.routing == "uniform" else f", {label.routing}"
    text = f"{label.library}: {label.call}, {label.rows}, T={label.tokens}{sms}{routing}"
    isolated = f"{result.isolated.median_us:.1f} us isolated (launch: {launch(result.ahead)})"
    return f"{text}: {isolated}, {result.back_to_back.median_us:.1f} back to back"


def cells(result: Result, of_limit: float | None) -> list[str]:
    """Return one row under `HEADER`; ``of_limit`` as from `Report.fraction`."""
    label, isolated = result.label, result.isolated
    call = label.call + "".join(f", {extra}" for extra in (label.note, label.routing) if extra not in ("", "uniform"))
    return [
        *(label.library, call, label.rows, str(label.tokens), dash(label.num_sms, "d")),
        *(f"{us:.1f}" for us in (isolated.median_us, isolated.p05_us, isolated.p95_us)),
        *(launch(result.ahead), f"{result.back_to_back.median_us:.1f}"),
        f"{result.bytes_out / 1e6:.2f}",
        f"{result.bytes_out / isolated.median_us / 1e3:.1f}",
        dash(of_limit, ".0%"),
    ]


def short_rows(results: Sequence[Result], of_limit: Sequence[float | None]) -> list[list[str]]:
    """Return rows under `SHORT_HEADER`: our calls with default SMs and uniform routing, and NCCL's beside them.

    Args:
        results: Results of all libraries.
        of_limit: Fraction of the limit of each result, as from `Report.fraction`.
    """
    baselines = {_key(r.label): r for r in results if r.label.library in ("nccl", "gloo")}
    rows: dict[tuple[str, ...], list[str]] = {}
    for result, fraction in zip(results, of_limit, strict=True):
        label = result.label
        if label.library != "tokenferry" or label.routing != "uniform" or label.note or not label.link:
            continue
        first = (label.call, label.rows, str(label.tokens), dash(label.num_sms, "d"))
        times = [f"{result.isolated.median_us:.1f}", launch(result.ahead), f"{result.back_to_back.median_us:.1f}"]
        baseline = baselines.get(_key(label))
        theirs = ["-", "-"]
        if baseline is not None:
            theirs = [f"{one.median_us:.1f}" for one in (baseline.isolated, baseline.back_to_back)]
        rows.setdefault(first, [*first, *times, dash(fraction, ".0%"), *theirs])
    return sorted(rows.values(), key=lambda row: (int(row[2]), row[0], row[1], row[3]))


def overlap_rows(items: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return rows under `OVERLAP_HEADER`."""
    return [
        [
            *(item["call"], dash(item["num_sms"], "d"), str(item["calls"])),
            *(item["gemm"], dash(item["carve_out"] or None, "d"), item["first"]),
            *(f"{item[name]:.0f}" for name in ("gemm_all_us", "gemm_us", "comm_us", "both_us")),
            *(f"{item[name]:.0%}" for name in ("hidden", "gemm_cost")),
        ]
        for item in items
    ]


def kernel_lines(items: Sequence[dict[str, Any]]) -> list[str]:
    """Return the GEMM kernels, a line for each kind of GEMM and number of SMs left out."""
    lines = []
    for item in items:
        found = item["kernels"]
        if not isinstance(found, str):
            found = "; ".join(f"{one['name'][:60]} {one['grid']} blocks, {one['us']:.0f} us" for one in found)
        lines.append(f"kernels of {item['gemm']}, {item['carve_out']} SMs left out: {found}")
    return lines


def host_rows(items: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return rows under `HOST_HEADER`."""
    return [[item["call"], f"{item['median_us']:.1f}", f"{item['least_us']:.1f}"] for item in items]


def show_cases(report: Report) -> Shown:
    """Show all cases."""
    if report.results:
        rows = [cells(result, report.fraction(result)) for result in report.results]
        yield Table("all cases, median us", HEADER, rows)
        yield f"MB out: {report.notes['bytes']}. of limit: against the best rate of the links in this run."
        yield f"isolated: {report.notes['isolated']}"
        yield f"checked: {report.notes['checked']}"


def show_others(report: Report) -> Shown:
    """Show overlap with GEMMs, host times, memory and first calls."""
    overlap, host = report.items("overlap"), report.items("host")
    if overlap:
        yield Table("overlap", OVERLAP_HEADER, overlap_rows(overlap))
    yield from kernel_lines(report.items("gemm kernels"))
    for item in report.items("overlap left out"):
        yield f"overlap beside {item['gemm']}, {item['carve_out']} SMs left out: not measured: {item['why']}"
    if host:
        yield Table("host", HOST_HEADER, host_rows(host))
    for item in report.items("memory"):
        yield "memory of a group: " + ", ".join(f"{name} {value:.1f}" for name, value in item.items())
    for item in report.items("first call"):
        for name, seconds in item.items():
            yield f"{name}: " + ", ".join(f"{step} {s:.3f} s" for step, s in seconds.items())


def show_short(report: Report) -> Shown:
    """Show what failed, and the short table."""
    for one in report.failed:
        yield f"not measured: {one['what']}: {one['why']}"
    rows = short_rows(report.results, [report.fraction(result) for result in report.results])
    if rows:
        yield Table(f"{report.about['title']}; medians", SHORT_HEADER, rows)


def launch(ahead: float) -> str:
    """Say whether launches are in an isolated time; in the part ``ahead`` of its iterations the hosts were ahead."""
    if ahead >= ALWAYS:
        return "ahead"
    return "in it" if ahead <= 1 - ALWAYS else f"{ahead:.0%}"


def dash(value: float | None, form: str) -> str:
    """Format a number; ``-`` for None."""
    return "-" if value is None else format(value, form)


def with_percentiles(values: Mapping[str, Any] | None, form: str = ".1f", unit_us: float = 1.0) -> str:
    """Format a summary: the median with 5th and 95th percentile; ``-`` for None.

    Args:
        values: A `Summary` as a dict.
        form: The format of a number.
        unit_us: Microseconds of the unit in which they are shown.
    """
    if values is None:
        return "-"
    one = Summary(**values)
    median, low, high = (format(us / unit_us, form) for us in (one.median_us, one.p05_us, one.p95_us))
    return f"{median} ({low}-{high})"


def in_ms(values: Mapping[str, Any]) -> str:
    """Format a summary in milliseconds, as `with_percentiles`."""
    return with_percentiles(values, ".2f", 1e3)


def differences(item: Mapping[str, Any]) -> str:
    """Format how far the results of two models are apart."""
    found = ", ".join(f"{name} {by:.1e}" for name, by in item["differ_by"].items())
    return f"norm of the difference over the norm: {found}"


def _key(label: Label) -> tuple[str, str, int]:
    return label.call.split(", rows in")[0], label.rows, label.tokens
