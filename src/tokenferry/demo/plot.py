"""The demo's plot: both loss curves, and the load of the experts."""

from __future__ import annotations

from pathlib import Path

from tokenferry.bench.report.files import with_folder
from tokenferry.demo.train import History
from tokenferry.errors import several


def write(path: Path, sharded: History, dense: History) -> bool:
    """Write a PNG and return True, or return False if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    loss, load = figure.subplots(1, 2)
    steps = range(1, len(sharded.losses) + 1)
    loss.plot(steps, sharded.losses, linewidth=3, alpha=0.5, label=f"{several(sharded.ranks, 'rank')}, experts sharded")
    loss.plot(steps, dense.losses, linewidth=1, color="black", label="one process, all experts")
    loss.set(xlabel="step", ylabel="loss, nats per byte", title="Loss of both runs")
    loss.legend()
    shares = [[count / max(1, sum(counts)) for count in counts] for counts in sharded.expert_tokens]
    by_expert = list(zip(*shares, strict=True))
    load.stackplot(steps, *by_expert, labels=[f"expert {e}" for e in range(len(by_expert))])
    load.set(xlabel="step", ylabel="share of the rows", ylim=(0, 1), title="Load of the experts, all layers")
    figure.legend(*load.get_legend_handles_labels(), loc="outside right center", reverse=True)
    figure.savefig(with_folder(path), dpi=120)
    return True
