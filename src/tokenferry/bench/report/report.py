"""The report of `tokenferry bench`: results as they come, JSON, pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenferry.bench.core.session import Label, Result, Settings
from tokenferry.bench.report import decode, eager, language, nodes, plots, tables, training, transformers
from tokenferry.bench.report.files import with_folder
from tokenferry.bench.suites.limits import Limits

SCHEMA = 3
"""Counts up when a field changes its meaning."""

CPU_NOTES = {
    "bytes": (
        "row bytes that a rank sends, those to itself included, mean over ranks: dispatch and fast combine one row per "
        "token and distinct rank, exact decode combine one row per token and expert; ids, weights and counts are not "
        "in it"
    ),
    "checked": "every row, scale and count of a dispatch and every sum of a combine: bit-equal",
    "baseline": "gloo all_to_all_single of the same row bytes, in the same process group, in turns with the call",
}
"""The meaning of the numbers of the CPU backend."""

GPU_NOTES = {
    "bytes": "bytes that leave a GPU in one call: rows to other ranks, with their scales; mean over ranks",
    "checked": "dispatch: every row bit-equal to its source; combine: every sum bit-equal (nccl: within rounding)",
    "isolated": (
        "ranks synchronised before each call, devices held until the hosts are ahead. launch: ahead: no time of a host "
        "is in it; in it: the host waits inside the call, so its launches are; a percentage: hosts were ahead in so "
        "many calls"
    ),
    "decode checked": decode.CHECKED,
    "decode limit": decode.LIMIT,
    "eager": eager.MODES,
    "eager checked": eager.CHECKED,
    "training": training.NOTE,
    "language": language.NOTE,
    "transformers": transformers.NOTE,
    "nodes": nodes.NOTE,
    "nodes checked": nodes.CHECKED,
    "nodes replayed": nodes.REPLAYED_NOTE,
    "nodes memory": nodes.MEMORY,
    "nodes decode": nodes.DECODE_NOTE,
    "nodes decode checked": nodes.DECODE_CHECKED,
}
"""The same of GPUs."""


@dataclass(slots=True, eq=False)
class Report:
    """Everything that has been measured so far; written to a file whenever something is added.

    Attributes:
        settings: Settings of the measurement.
        about: Machine, commit, command.
        notes: The meaning of the numbers.
        file: Where it is written; None: nowhere.
        results: Cases.
        limits: The rates of the links, once they are known.
        others: Items of other kinds (``"host"``, ``"memory"``, ``"overlap"``, ``"first call"``), by kind.
        failed: Cases and phases that failed, and why.
    """

    settings: Settings
    about: dict[str, Any]
    notes: Mapping[str, str]
    file: Path | None = None
    results: list[Result] = field(default_factory=list)
    limits: Limits | None = None
    others: dict[str, list[Any]] = field(default_factory=dict)
    failed: list[dict[str, Any]] = field(default_factory=list)

    def take(self, item: dict[str, Any]) -> str:
        """Take one item of progress, and return the line to show for it; empty if there is none."""
        if "case" in item:
            self.results.append(item["case"])
            self.write()
            return tables.result_line(self.results[-1])
        if "failed" in item:
            self.fail(item["failed"], item["why"])
            return f"FAILED {item['failed']}: {item['why']}"
        [kind] = item.keys()
        self.others.setdefault(kind, []).append(item[kind])
        self.write()
        line = {
            "decode": decode.line,
            "two_batch": decode.two_batch_line,
            "eager": eager.line,
            "nodes": nodes.line,
            "nodes replayed": nodes.replayed_line,
            "nodes memory": nodes.memory_line,
            "nodes decode": nodes.decode_line,
        }.get(kind)
        return line(item[kind]) if line else ""

    def items(self, kind: str) -> list[Any]:
        """Return the items of a kind so far."""
        return self.others.get(kind, [])

    def show(self) -> tables.Shown:
        """Return what is printed of everything but the short table."""
        parts = (tables.show_cases, decode.show, eager.show, training.show, transformers.show, language.show)
        for show in (*parts, nodes.show, tables.show_others):
            yield from show(self)

    @property
    def node_us(self) -> float | None:
        """An empty kernel in a graph, if that was measured."""
        return self._us("graph node")

    @property
    def empty_us(self) -> float | None:
        """The host's time of ``torch.empty(8)``, if that was measured."""
        return self._us("torch.empty(8)")

    def fail(self, what: str, why: str) -> None:
        """Record something that could not be measured."""
        self.failed.append({"what": what, "why": why})
        self.write()

    def limit_for(self, label: Label) -> float | None:
        """Return the best rate of the link that a case uses, GB/s, for rows of about its size; None if unknown."""
        if self.limits is None or not label.link:
            return None
        return self.limits.near(label.link, label.row_bytes) or None

    def fraction(self, result: Result) -> float | None:
        """Return the time that the limit needs for the bytes over the isolated median; None if there is no limit."""
        limit = self.limit_for(result.label)
        if limit is None or not result.bytes_out:
            return None
        return result.bytes_out / limit / 1e3 / result.isolated.median_us

    def write(self) -> None:
        """Write the file anew, as a whole or not at all."""
        if self.file is None:
            return
        draft = with_folder(self.file.with_name(self.file.name + ".part"))
        draft.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.file)

    def as_json(self) -> dict[str, Any]:
        """Return it as plain dicts."""
        others = dict(self.others)
        if "decode" in others:
            others["decode"] = decode.as_json(others["decode"], self.limits, self.node_us)
        return {
            "schema": SCHEMA,
            **self.about,
            "notes": dict(self.notes),
            "settings": asdict(self.settings),
            "limits": None if self.limits is None else asdict(self.limits),
            "results": [self._result_json(result) for result in self.results],
            **others,
            "failed": self.failed,
        }

    def _us(self, kind: str) -> float | None:
        found = self.items(kind)
        return float(found[-1]["us"]) if found else None

    def _result_json(self, result: Result) -> dict[str, Any]:
        return {
            **asdict(result),
            "ratio": tables.ratios(result),
            "limit_gbps": self.limit_for(result.label),
            "of_limit": self.fraction(result),
        }

    def draw(self, folder: Path) -> list[Path]:
        """Write the pictures of all results; return their files."""
        title = str(self.about.get("title", ""))
        files = self._draw_calls(folder) if self.results else []
        if "decode" in self.others:
            curves = decode.curves(self.others["decode"], self.limits, self.node_us)
            decoding = f"{title}, decode calls as CUDA graphs, back to back"
            files += plots.plot_tokens(*curves, folder, decoding, "decode.png")
        for name, bars in (("eager", eager.bars), ("training", training.bars)):
            if name in self.others:
                files += plots.plot_bars(bars(self.others[name]), folder, title, f"{name}.png")
        return files

    def _draw_calls(self, folder: Path) -> list[Path]:
        ours = [r for r in self.results if r.label.link and r.label.routing == "uniform" and not r.label.note]
        title = str(self.about.get("title", ""))
        by_tokens: dict[str, list[tuple[float, float]]] = {}
        by_sms: dict[str, list[tuple[float, float]]] = {}
        floors: dict[str, list[tuple[float, float]]] = {}
        default = {(r.label.call, r.label.rows, r.label.tokens): r for r in reversed(ours)}
        for result in ours:
            label = result.label
            name = f"{label.library}: {label.call}, {label.rows}"
            if label.library != "tokenferry" or default[label.call, label.rows, label.tokens] is result:
                by_tokens.setdefault(name, []).append((label.tokens, result.isolated.median_us))
            if label.library == "tokenferry" and label.num_sms and label.tokens == self.settings.sweep_tokens:
                rate = result.bytes_out / result.isolated.median_us / 1e3
                by_sms.setdefault(f"{label.call}, {label.rows}", []).append((label.num_sms, rate))
            limit = self.limit_for(label)
            if limit is not None and label.call == "dispatch, plan kept" and label.library == "tokenferry":
                point = (label.tokens, result.bytes_out / limit / 1e3)
                floors.setdefault(f"limit, {label.rows}", []).append(point)
        floors = {name: sorted(set(points)) for name, points in floors.items()}
        swept = f"{title}, T={self.settings.sweep_tokens}"
        return [
            *plots.plot_tokens(by_tokens, floors, folder, title),
            *plots.plot_sms(by_sms, self.limits, folder, swept),
        ]
