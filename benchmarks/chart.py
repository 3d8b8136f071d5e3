"""Draw the chart of the README, chart.svg, from the measurements beside this file: `make chart`.

The times of tokenferry and NCCL are medians in files that `tokenferry bench --json` wrote; those of DeepEP V1 and V2.5,
which ran on the same kind of machine, stand in tables of README.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHART = HERE / "chart.svg"
CALLS = "2026-11-29_4xh200_67d3d47-calls.json"
NCCL_CALLS = "2026-11-21_4xh200_0bfa639-quick.json"
DECODE = "2026-11-29_4xh200_67d3d47-decode.json"
TRAINING = "2026-11-29_2xh200_345edae-megatron.json"
LANGUAGE = "2026-11-30_2xh200_61542ee-language.json"

OURS, V1, V2_5, NCCL = "tokenferry", "DeepEP V1", "DeepEP V2.5", "NCCL all-to-all"
COLOURS = {OURS: "#0b7285", V1: "#e8890c", V2_5: "#b5651d", NCCL: "#868e96"}
TOKENS = 4096
DECODE_TOKENS = (1, 32, 128)


@dataclass(frozen=True)
class Call:
    """A call of which all libraries were measured: its label here, and its name in files and in a table."""

    label: str
    call: str
    rows: str
    in_table: str


COMPARED = (
    Call("dispatch\nFP8", "dispatch", "fp8", "dispatch FP8"),
    Call("dispatch FP8,\nplan kept", "dispatch, plan kept", "fp8", "dispatch FP8, plan kept"),
    Call("dispatch BF16,\nplan kept", "dispatch, plan kept", "bf16", "dispatch BF16, plan kept"),
    Call("combine\nBF16", "combine, rows in user memory", "bf16", "combine BF16, rows in the user's memory"),
)


@dataclass(frozen=True)
class Panel:
    """One part of the chart: for each group of bars the time of each library."""

    title: str
    unit: str
    groups: Mapping[str, Mapping[str, float]]


def panels() -> list[Panel]:
    """Return what the chart shows, like beside like."""
    return [
        Panel(f"Calls, {TOKENS} tokens a rank, isolated\n4 H200", "us", _calls()),
        Panel("Decode dispatch and exact combine,\nas a CUDA graph, 4 H200", "us", _decode()),
        Panel("Training step, 2 H200: two layers\nof Megatron-Core; a language model", "ms", _training()),
    ]


def _calls() -> dict[str, dict[str, float]]:
    ours, nccl, deepep = _medians(CALLS, OURS), _medians(NCCL_CALLS, "nccl"), _table("call | target | tokenferry")
    return {
        one.label: {
            OURS: ours[one.call, one.rows],
            V1: float(deepep[one.in_table]["DeepEP V1, 24 SMs"].split(" / ")[0]),
            V2_5: float(deepep[one.in_table]["DeepEP V2.5, 20 SMs"].split(" / ")[0]),
            NCCL: nccl[one.call.removesuffix(", rows in user memory"), one.rows],
        }
        for one in COMPARED
    }


def _medians(file: str, library: str) -> dict[tuple[str, str], float]:
    """Return the isolated medians of a library at T=4096 with uniform routing, by call and rows."""
    report = _read(file)
    # Older files have other words.
    isolated, who = ("isolated", "library") if "isolated" in report["results"][0] else ("drained", "who")
    labels = ((one["label"], one[isolated]["median_us"]) for one in report["results"])
    return {
        (label["call"], label["rows"]): median_us
        for label, median_us in labels
        if (label[who], label["tokens"], label["routing"]) == (library, TOKENS, "uniform")
    }


def _decode() -> dict[str, dict[str, float]]:
    v1 = _table("T | dispatch FP8 | dispatch BF16")
    ours = {one["tokens"]: one["graph"]["median_us"] for one in _read(DECODE)["decode"] if one["call"] == "pair exact"}
    return {
        f"{tokens} token{'s' * (tokens > 1)}\na rank": {
            OURS: ours[tokens],
            V1: float(v1[str(tokens)]["DeepEP V1 pair"]),
        }
        for tokens in DECODE_TOKENS
    }


def _training() -> dict[str, dict[str, float]]:
    steps = {one["dispatcher"]: one["back_to_back"]["median_us"] / 1e3 for one in _read(TRAINING)["training"]}
    model = {one["experts"]: one["back_to_back"]["median_us"] / 1e3 for one in _read(LANGUAGE)["language"]}
    return {
        "Hybrid-\nEPBuffer": {OURS: steps["flex, hybridep"]},
        "Buffer": {OURS: steps["flex, deepep"]},
        "Mega-\ntron's": {NCCL: steps["alltoall"]},
        "language\nmodel": {OURS: model["tokenferry"], NCCL: model["all_to_all_single"]},
    }


def _read(file: str) -> Any:  # noqa: ANN401 - what json gives
    return json.loads((HERE / file).read_text(encoding="utf-8"))


def _table(heading: str) -> dict[str, dict[str, str]]:
    """Return a table of README.md, by its first column and its header, without marks of emphasis."""
    page = (HERE / "README.md").read_text(encoding="utf-8").replace("**", "")
    header, _, *rows = re.split(r"\n", page[page.index(f"| {heading}") :].partition("\n\n")[0])
    names, *cells = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in (header, *rows))
    return {row[0]: dict(zip(names, row, strict=True)) for row in cells}


def draw(file: Path) -> None:
    """Draw the chart: linear axes that begin at 0, text as text, and the same bytes each time."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "tokenferry", "font.size": 9, "axes.spines.right": False}
    with mpl.rc_context({**style, "axes.spines.top": False, "font.family": "sans-serif"}):
        figure = Figure(figsize=(11, 3.9), layout="constrained", facecolor="white")
        drawn = panels()
        parts = figure.subplots(1, len(drawn), width_ratios=(4.4, 2.8, 2.8))
        for axes, panel in zip(parts, drawn, strict=True):
            _draw_panel(axes, panel)
        bars = {label: bar for axes in parts for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        used = [library for library in COLOURS if library in bars]
        figure.legend([bars[one] for one in used], used, loc="outside lower center", ncols=len(used), frameon=False)
        figure.savefig(file, metadata={"Date": None})
    file.write_text("\n".join(map(str.rstrip, file.read_text(encoding="utf-8").splitlines())) + "\n", encoding="utf-8")


def _draw_panel(axes: Any, panel: Panel) -> None:  # noqa: ANN401 - matplotlib
    width = 0.8 / max(map(len, panel.groups.values()))
    for library in COLOURS:
        points = [
            (group + (list(times).index(library) - (len(times) - 1) / 2) * width, times[library])
            for group, times in enumerate(panel.groups.values())
            if library in times
        ]
        if points:
            bars = axes.bar(
                *zip(*points, strict=True), width * 0.94, label=library, color=COLOURS[library], clip_on=False
            )
            axes.bar_label(bars, [shown(us) for _, us in points], padding=1, fontsize=7)
    axes.set_title(panel.title, fontsize=9.5)
    axes.set_xticks(range(len(panel.groups)), panel.groups)
    axes.set_ylabel(f"{panel.unit}, median; less is better")
    axes.margins(y=0.08)
    axes.set_ylim(bottom=0)


def shown(value: float) -> str:
    """Return a time as the chart writes it."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


if __name__ == "__main__":
    draw(CHART)
