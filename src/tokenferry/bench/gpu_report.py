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
from tokenferry.bench import plots, report
from tokenferry.bench.limits import Limits
from tokenferry.bench.trial import Label, Result, Settings, result_from_json

SCHEMA = 1
BYTES = "bytes that leave a GPU in one call: rows to other ranks, with their scales; mean over ranks"
CHECKED = "dispatch: every row bit-equal to its source; combine: every sum bit-equal (nccl: within rounding)"
HEADER = (*("who", "call", "rows", "T", "SMs", "drained us", "p05", "p95", "chained us", "MB out", "GB/s", "of limit"),)
SHORT_HEADER = ("call", "rows", "T", "SMs", "drained us", "chained us", "of limit", "nccl drained", "nccl chained")


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
        return ""

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
        return f"{text}: {result.drained.median_us:.1f} us drained, {result.chained.median_us:.1f} chained"

    def limit_for(self, label: Label) -> float | None:
        """The best rate of the link that a case uses, GB/s, for rows of about its size; None if unknown."""
        if self.limits is None or not label.link:
            return None
        sizes = {rate.row_bytes for rate in self.limits.rates}
        if not sizes:
            return None
        nearest = min(sizes, key=lambda size: abs(size - label.row_bytes))
        return self.limits.best(label.link, nearest) or None

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
            "settings": asdict(self.settings),
            "limits": None if self.limits is None else self.limits.as_json(),
            "results": [
                {**asdict(result), "limit_gbps": self.limit_for(result.label), "of_limit": self.fraction(result)}
                for result in self.results
            ],
            **self.others,
            "failed": self.failed,
        }

    def cells(self, result: Result) -> list[str]:
        """One row under `HEADER`."""
        label, drained = result.label, result.drained
        call = label.call + "".join(
            f", {extra}" for extra in (label.note, label.routing) if extra not in ("", "uniform")
        )
        fraction = self.fraction(result)
        return [
            *(label.who, call, label.rows, str(label.tokens), _dash(label.num_sms, "d")),
            *(f"{us:.1f}" for us in (drained.median_us, drained.p05_us, drained.p95_us, result.chained.median_us)),
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
            times = [f"{s.median_us:.1f}" for s in (result.drained, result.chained)]
            theirs = ["-", "-"] if rival is None else [f"{s.median_us:.1f}" for s in (rival.drained, rival.chained)]
            rows.append([*_start(label), *times, _dash(self.fraction(result), ".0%"), *theirs])
        return sorted(rows, key=lambda row: (int(row[2]), row[0], row[1], row[3]))

    def draw(self, folder: Path) -> list[Path]:
        """Write the pictures; returns their files."""
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
            *(item["call"], _dash(item["num_sms"], "d"), str(item["tokens"])),
            *(f"{item[name]:.0f}" for name in ("gemm_us", "comm_us", "both_us")),
            *(f"{item[name]:.0%}" for name in ("hidden", "gemm_cost")),
        ]
        for item in items
    ]


OVERLAP_HEADER = ("beside GEMMs", "SMs", "T", "GEMMs us", "calls us", "both us", "hidden", "GEMM slower by")


def host_rows(items: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows under `HOST_HEADER`."""
    return [[item["call"], f"{item['median_us']:.1f}", f"{item['least_us']:.1f}"] for item in items]


HOST_HEADER = ("host time of an eager call", "median us", "least us")
