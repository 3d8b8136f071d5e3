"""Pictures of the waits of each rank for each other rank. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenferry.bench.report.plots import save


def plot_waits(tables: Mapping[str, Sequence[Sequence[float]]], folder: Path, title: str) -> list[Path]:
    """Write waits.png: a heat map for each table.

    Args:
        tables: By name ``[R][R]`` microseconds: the wait of the rank of the row for that of the column.
        folder: Output folder, made if it does not exist.
        title: Title above all of them.

    Returns:
        list: The files written.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, nothing global

    num_ranks = len(next(iter(tables.values())))
    figure = Figure(figsize=(max(3.6, 0.7 * num_ranks + 1.4) * len(tables), max(3.4, 0.6 * num_ranks + 1.6)))
    figure.set_layout_engine("constrained")
    most = max(value for us in tables.values() for row in us for value in row)  # one scale for all
    for i, (name, us) in enumerate(tables.items()):
        axes = figure.add_subplot(1, len(tables), i + 1)
        image = axes.imshow(us, cmap="inferno", vmin=0, vmax=most or 1.0)
        for r, row in enumerate(us):
            for s, value in enumerate(row):
                if r != s:
                    ink = "white" if value < most / 2 else "black"
                    axes.text(s, r, f"{value:.1f}", ha="center", va="center", color=ink, fontsize=8)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("for rank")
        axes.set_ylabel("rank")
        axes.set_xticks(range(num_ranks))
        axes.set_yticks(range(num_ranks))
        figure.colorbar(image, ax=axes, label="us an iteration", shrink=0.8)
    figure.suptitle(title, fontsize=9)
    return [save(figure, folder / "waits.png")]
