"""What `tokenferry bench --device cuda` says: results as they come, tables, JSON, pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import tokenferry
from tokenferry.bench.core.session import Label, Result, Settings, result_from_json
from tokenferry.bench.report import cpu as report
from tokenferry.bench.report import decode as decode_report
from tokenferry.bench.report import plots
from tokenferry.bench.suites.limits import Limits

SCHEMA = 2
BYTES = "bytes that leave a GPU in one call: rows to other ranks, with their scales; mean over ranks"
CHECKED = "dispatch: every row bit-equal to its source; combine: every sum bit-equal (nccl: within rounding)"
DRAINED = (
    "ranks synchronised before each call, devices held until the hosts are ahead. launch: ahead: no time of a host is "
    "in it; in it: the host waits inside the call, so its launches are; a percentage: hosts were ahead in so many calls"
)
HEADER = (
    *("who", "call", "rows", "T", "SMs", "drained us", "p05", "p95", "launch", "chained us"),
    *("MB out", "GB/s", "of limit"),
)
SHORT_HEADER = (
    *("call", "rows", "T", "SMs", "drained us", "launch", "chained us", "of limit", "nccl drained", "nccl chained"),
)


@dataclass(slots=True, eq=False)
class Report:
    """Everything that has been measured so far; written to a file whenever something is added.

    Attributes:
        settings: What is measured.
        about: Machine, commit, command.
        file: Where to, or None.
        results: Cases.
        limits: What the links do, once it is known.
        others: Items of other kinds (``"host"``, ``"memory"``, ``"overlap"``, ``"first call"``), by kind.
        failed: What failed, and why.
    """

    settings: Settings
    about: dict[str, Any]
    file: Path | None = None
    results: list[Result] = field(default_factory=list)
    limits: Limits | None = None
    others: dict[str, list[Any]] = field(default_factory=dict)
    failed: list[dict[str, Any]] = field(default_factory=list)

    def take(self, item: dict[str, Any]) -> str:
        """Take one item of news, and return the line to show for it; empty if there is none."""
        if "case" in item:
            self.results.append(result_from_json(item["case"]))
            self.write()
            return self.line(self.results[-1])
        if "failed" in item:
            self.fail(item["failed"], item["why"])
            return f"FAILED {item['failed']}: {item['why']}"
        [kind] = item.keys()
        if kind == "now":
            return ""
        self.others.setdefault(kind, []).append(item[kind])
        self.write()
        tell = {"decode": decode_report.line, "micro": decode_report.micro_line}.get(kind)
        return tell(item[kind]) if tell else ""

    @property
    def node_us(self) -> float | None:
        """An empty kernel in a graph, if that was measured."""
        found = self.others.get("graph node")
        return float(found[-1]["us"]) if found else None

    def fail(self, what: str, why: str) -> None:
        """Remember something that could not be measured."""
        self.failed.append({"what": what, "why": why})
        self.write()

    def line(self, result: Result) -> str:
        """One result for people who watch."""
        label = result.label
        sms = "" if label.num_sms is None else f", {label.num_sms} SMs"
        routing = "" if label.routing == "uniform" else f", {label.routing}"
        text = f"{label.who}: {label.call}, {label.rows}, T={label.tokens}{sms}{routing}"
        drained = f"{result.drained.median_us:.1f} us drained (launch: {launch(result)})"
        return f"{text}: {drained}, {result.chained.median_us:.1f} chained"

    def limit_for(self, label: Label) -> float | None:
        """The best rate of the link that a case uses, GB/s, for rows of about its size; None if unknown."""
        if self.limits is None or not label.link:
            return None
        return self.limits.near(label.link, label.row_bytes) or None

    def fraction(self, result: Result) -> float | None:
        """The time that the limit needs for the bytes over the drained median; None if there is no limit."""
        limit = self.limit_for(result.label)
        if limit is None or not result.bytes_out:
            return None
        return result.bytes_out / limit / 1e3 / result.drained.median_us

    def write(self) -> None:
        """Write the file anew, as a whole or not at all."""
        if self.file is None:
            return
        draft = self.file.with_name(self.file.name + ".part")
        draft.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.file)

    def as_json(self) -> dict[str, Any]:
        """As plain dicts."""
        return {
            "schema": SCHEMA,
            **self.about,
            "bytes": BYTES,
            "checked": CHECKED,
            "drained": DRAINED,
            "settings": asdict(self.settings),
            "limits": None if self.limits is None else self.limits.as_json(),
            "results": [
                {**asdict(result), "limit_gbps": self.limit_for(result.label), "of_limit": self.fraction(result)}
                for result in self.results
            ],
            **self.others,
            **self._decode_json(),
            "failed": self.failed,
        }

    def _decode_json(self) -> dict[str, Any]:
        if "decode" not in self.others:
            return {}
        cases = decode_report.as_json(self.others["decode"], self.limits, self.node_us)
        return {"decode": cases, "decode checked": decode_report.CHECKED, "decode limit": decode_report.LIMIT}

    def cells(self, result: Result) -> list[str]:
        """One row under `HEADER`."""
        label, drained = result.label, result.drained
        call = label.call + "".join(
            f", {extra}" for extra in (label.note, label.routing) if extra not in ("", "uniform")
        )
        fraction = self.fraction(result)
        return [
            *(label.who, call, label.rows, str(label.tokens), _dash(label.num_sms, "d")),
            *(f"{us:.1f}" for us in (drained.median_us, drained.p05_us, drained.p95_us)),
            *(launch(result), f"{result.chained.median_us:.1f}"),
            f"{result.bytes_out / 1e6:.2f}",
            f"{result.bytes_out / drained.median_us / 1e3:.1f}",
            _dash(fraction, ".0%"),
        ]

    def short(self) -> list[list[str]]:
        """Rows under `SHORT_HEADER`: our calls with default SMs and uniform routing, and the rival beside them."""
        rivals = {_key(r.label): r for r in self.results if r.label.who in ("nccl", "gloo")}
        rows: list[list[str]] = []
        for result in self.results:
            label = result.label
            if label.who != "tokenferry" or label.routing != "uniform" or label.note or not label.link:
                continue
            if any(row[:4] == _start(label) for row in rows):
                continue
            rival = rivals.get(_key(label))
            times = [f"{result.drained.median_us:.1f}", launch(result), f"{result.chained.median_us:.1f}"]
            theirs = ["-", "-"] if rival is None else [f"{s.median_us:.1f}" for s in (rival.drained, rival.chained)]
            rows.append([*_start(label), *times, _dash(self.fraction(result), ".0%"), *theirs])
        return sorted(rows, key=lambda row: (int(row[2]), row[0], row[1], row[3]))

    def draw(self, folder: Path) -> list[Path]:
        """Write the pictures of what was measured; returns their files."""
        return [*(self._draw_calls(folder) if self.results else ()), *self._draw_decode(folder)]

    def _draw_decode(self, folder: Path) -> list[Path]:
        if "decode" not in self.others:
            return []
        times, floors = decode_report.curves(self.others["decode"], self.limits, self.node_us)
        title = f"{self.about.get('title', '')}, decode calls as CUDA graphs, chained"
        return plots.plot_tokens(times, floors, folder, title, "decode.png")

    def _draw_calls(self, folder: Path) -> list[Path]:
        ours = [r for r in self.results if r.label.link and r.label.routing == "uniform" and not r.label.note]
        title = str(self.about.get("title", ""))
        by_tokens: dict[str, list[tuple[float, float]]] = {}
        by_sms: dict[str, list[tuple[float, float]]] = {}
        floors: dict[str, list[tuple[float, float]]] = {}
        default = {(r.label.call, r.label.rows, r.label.tokens): r for r in reversed(ours)}
        for result in ours:
            label = result.label
            name = f"{label.who}: {label.call}, {label.rows}"
            if label.who != "tokenferry" or default[label.call, label.rows, label.tokens] is result:
                by_tokens.setdefault(name, []).append((label.tokens, result.drained.median_us))
            if label.who == "tokenferry" and label.num_sms and label.tokens == self.settings.sweep_tokens:
                rate = result.bytes_out / result.drained.median_us / 1e3
                by_sms.setdefault(f"{label.call}, {label.rows}", []).append((label.num_sms, rate))
            limit = self.limit_for(label)
            if limit is not None and label.call == "dispatch, plan kept" and label.who == "tokenferry":
                point = (label.tokens, result.bytes_out / limit / 1e3)
                floors.setdefault(f"limit, {label.rows}", []).append(point)
        floors = {name: sorted(set(points)) for name, points in floors.items()}
        swept = f"{title}, T={self.settings.sweep_tokens}"
        return [
            *plots.plot_tokens(by_tokens, floors, folder, title),
            *plots.plot_sms(by_sms, self.limits, folder, swept),
        ]


def about(command: str, gpus: dict[str, Any], title: str) -> dict[str, Any]:
    """What the numbers belong to."""
    return {
        "title": title,
        "tokenferry": tokenferry.__version__,
        "commit": report.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": report.machine(),
        "gpus": gpus,
    }


def launch(result: Result) -> str:
    """Whether the hosts' launches are in the drained time; see `DRAINED`."""
    return decode_report.launch(result.ahead)


def _key(label: Label) -> tuple[str, str, int]:
    return label.call.split(", rows in")[0], label.rows, label.tokens


def _start(label: Label) -> list[str]:
    return [label.call, label.rows, str(label.tokens), _dash(label.num_sms, "d")]


def _dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def overlap_rows(items: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows under `OVERLAP_HEADER`."""
    return [
        [
            *(item["call"], _dash(item["num_sms"], "d"), str(item["calls"])),
            *(item["gemm"], _dash(item["carve_out"] or None, "d"), item["first"]),
            *(f"{item[name]:.0f}" for name in ("gemm_all_us", "gemm_us", "comm_us", "both_us")),
            *(f"{item[name]:.0%}" for name in ("hidden", "gemm_cost")),
        ]
        for item in items
    ]


OVERLAP_HEADER = (
    *("beside GEMMs", "SMs", "calls", "GEMMs by", "SMs left out", "first"),
    *("GEMMs us", "with SMs left out", "calls us", "both us", "hidden", "GEMMs slower by"),
)


def kernel_lines(items: Sequence[dict[str, Any]]) -> list[str]:
    """What the GEMM kernels are, a line for each kind of GEMM and number of SMs left out."""
    lines = []
    for item in items:
        found = item["kernels"]
        if not isinstance(found, str):
            found = "; ".join(f"{one['name'][:60]} {one['grid']} blocks, {one['us']:.0f} us" for one in found)
        lines.append(f"kernels of {item['gemm']}, {item['carve_out']} SMs left out: {found}")
    return lines


def host_rows(items: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows under `HOST_HEADER`."""
    return [[item["call"], f"{item['median_us']:.1f}", f"{item['least_us']:.1f}"] for item in items]


HOST_HEADER = ("host time of an eager call", "median us", "least us")
