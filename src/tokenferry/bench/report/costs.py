"""A picture of `tokenferry.cost`: microseconds of calls against nodes. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenferry.bench.report.plots import save
from tokenferry.cost.calls import CallCost
from tokenferry.cost.estimate import Estimate, Family


def plot_costs(estimates: Sequence[Estimate], file: Path) -> None:
    """Write a PNG of both families: whole calls and their legs, over the nodes of the estimates."""
    from matplotlib.figure import Figure  # without pyplot: no display, nothing global

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    nodes = [each.case.cluster.num_nodes for each in estimates]
    last = estimates[-1]
    for axes, family in zip(figure.subplots(1, 2), (last.throughput, last.decoding), strict=True):
        families = [getattr(each, family.name) for each in estimates]
        for colour, call in (("C0", "dispatch"), ("C1", "combine")):
            _draw(axes, nodes, families, call, colour)
            if family is last.decoding:
                bytes_us = [getattr(each.deep_ep_v1, f"{call}_us") for each in estimates]
                axes.plot(nodes, bytes_us, "x:", color=colour, label=f"{call}, bytes of DeepEP V1 low latency")
        axes.set_title(f"{family.name}, T={family.tokens}", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xticks(nodes, [str(count) for count in nodes])
        axes.set(xlabel=f"nodes of {last.case.cluster.ranks_per_node} ranks", ylabel="us", ylim=(0, None))
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=8)
    case, shape, links = last.case, last.case.shape, last.links
    figure.suptitle(
        f"a model: E={shape.num_experts} K={shape.top_k} H={shape.hidden}, {case.rows} dispatch, {case.gate}, "
        f"network {links.network_gbs:g} GB/s, NVLink {links.nvlink_gbs:g} GB/s",
        fontsize=11,
    )
    save(figure, file)


def _draw(axes: Any, nodes: list[int], families: list[Family], call: str, colour: str) -> None:  # noqa: ANN401 - matplotlib
    costs: list[CallCost] = [getattr(family, call) for family in families]
    axes.plot(nodes, [cost.times.total_us for cost in costs], "o-", color=colour, label=call)
    axes.plot(nodes, [cost.times.network_us for cost in costs], "--", color=colour, label=f"{call}, network leg")
    axes.plot(nodes, [cost.times.nvlink_us for cost in costs], ":", color=colour, label=f"{call}, NVLink leg")
