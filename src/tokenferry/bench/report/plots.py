"""Pictures: bandwidth against SMs, time against tokens, with the limit drawn in; medians as bars. Needs matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenferry.bench.report.files import with_folder
from tokenferry.bench.suites.limits import Limits
from tokenferry.errors import BackendUnavailable

Points = Sequence[tuple[float, float]]


def need_matplotlib() -> None:
    """Look for matplotlib before anything is measured.

    Raises:
        BackendUnavailable: it is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            "--plot needs matplotlib: pip install 'tokenferry[plots]', or leave --plot out"
        ) from error


def plot_limits(limits: Limits, folder: Path, title: str) -> list[Path]:
    """Write limits.png: GB/s against SMs for stores and loads of every row size; return its file."""

    def draw(axes: Any) -> None:  # noqa: ANN401 - matplotlib
        for kind, line in (("store", "o-"), ("load", "s--")):
            for row_bytes in sorted({rate.row_bytes for rate in limits.rates}):
                points = [
                    (rate.num_sms, rate.gbps)
                    for rate in limits.rates
                    if (rate.kind, rate.row_bytes) == (kind, row_bytes)
                ]
                _line(axes, points, line, f"bulk {kind}, rows of {row_bytes} B")

    return [_figure(folder / "limits.png", title, "SMs", "GB/s that leave each GPU", draw)]


def plot_sms(curves: Mapping[str, Points], limits: Limits | None, folder: Path, title: str) -> list[Path]:
    """Write sms.png: GB/s of calls against SMs, between the curves of the links."""

    def draw(axes: Any) -> None:  # noqa: ANN401 - matplotlib
        for name, points in curves.items():
            _line(axes, points, "o-", name)
        for kind, row_bytes in () if limits is None else (("store", 7168), ("store", 14336), ("load", 14336)):
            assert limits is not None
            rates = [r for r in limits.rates if (r.kind, r.row_bytes) == (kind, row_bytes)]
            _line(axes, [(r.num_sms, r.gbps) for r in rates], ":", f"limit: {kind}, {row_bytes} B")

    return [_figure(folder / "sms.png", title, "SMs", "GB/s that leave each GPU", draw)]


def plot_tokens(
    curves: Mapping[str, Points], floors: Mapping[str, Points], folder: Path, title: str, file: str = "tokens.png"
) -> list[Path]:
    """Write a picture: microseconds against tokens, both logarithmic; ``floors`` are the times that the links need.

    The floor called ``limit: name`` gets the colour of the curve called ``name``.
    """

    def draw(axes: Any) -> None:  # noqa: ANN401 - matplotlib
        colours = {f"limit: {name}": f"C{i}" for i, name in enumerate(curves)}
        for name, points in curves.items():
            _line(axes, points, "o-", name)
        for name, points in floors.items():
            _line(axes, points, ":", name, colours.get(name))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        measured = sorted({tokens for points in curves.values() for tokens, _ in points})
        axes.set_xticks(measured, map(str, measured), minor=False)
        axes.yaxis.set_major_formatter("{x:g}")
        times = [us for points in curves.values() for _, us in points]
        axes.set_ylim(bottom=min(times, default=1.0) / 2)  # far below, the limit of a few bytes says little

    return [_figure(folder / file, title, "tokens on each rank", "us, median", draw)]


@dataclass(frozen=True, slots=True)
class Bars:
    """A part of a picture: for each group of bars the value of each series, in ``unit``."""

    title: str
    unit: str
    groups: Mapping[str, Mapping[str, float]]


def plot_bars(parts: Sequence[Bars], folder: Path, title: str, file: str) -> list[Path]:
    """Write a picture of medians beside one another, on linear axes from 0; return its file."""
    from matplotlib.figure import Figure

    series = list(dict.fromkeys(name for part in parts for values in part.groups.values() for name in values))
    rows = -(-len(parts) // 2)
    figure = Figure(figsize=(12, 1 + 3.6 * rows), layout="constrained")
    drawn = figure.subplots(rows, min(2, len(parts)), squeeze=False).flat
    for axes, part in zip(drawn, parts, strict=False):
        _draw_bars(axes, part, series)
    for axes in list(drawn)[len(parts) :]:
        axes.set_axis_off()
    colours = [f"C{i}" for i in range(len(series))]
    marks: list[Any] = [figure.axes[0].bar([0], [0], color=colour) for colour in colours]
    figure.suptitle(title, fontsize=10)
    figure.legend(marks, series, loc="outside lower center", ncols=len(series), frameon=False)
    return [save(figure, folder / file)]


def _draw_bars(axes: Any, part: Bars, series: Sequence[str]) -> None:  # noqa: ANN401 - matplotlib
    width = 0.8 / max(map(len, part.groups.values()))
    digits = 1 if max(value for values in part.groups.values() for value in values.values()) < 100 else 0
    for i, name in enumerate(series):
        points = [
            (group + (list(values).index(name) - (len(values) - 1) / 2) * width, values[name])
            for group, values in enumerate(part.groups.values())
            if name in values
        ]
        if points:
            bars = axes.bar(*zip(*points, strict=True), width * 0.94, color=f"C{i}")
            axes.bar_label(bars, [f"{value:.{digits}f}" for _, value in points], fontsize=7)
    axes.set_title(part.title, fontsize=9)
    names = [textwrap.fill(name, 13, break_long_words=False) for name in part.groups]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel(f"{part.unit}, median")
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)


def _line(
    axes: Any,  # noqa: ANN401 - matplotlib
    points: Points,
    style: str,
    label: str,
    colour: str | None = None,
) -> None:
    if points:
        axes.plot(*zip(*sorted(points), strict=True), style, label=label, color=colour)


def _figure(file: Path, title: str, x_label: str, y_label: str, draw: Callable[[Any], None]) -> Path:
    from matplotlib.figure import Figure  # without pyplot: no display, nothing global

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)
    axes.set_ylim(bottom=0 if axes.get_yscale() == "linear" else None)
    return save(figure, file)


def save(figure: Any, file: Path) -> Path:  # noqa: ANN401 - matplotlib
    """Write a picture; return its file."""
    figure.savefig(with_folder(file), dpi=120)
    return file
