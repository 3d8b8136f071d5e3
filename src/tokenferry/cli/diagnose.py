"""`tokenferry diagnose`: which rank do the others wait for, and why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokenferry
from tokenferry.bench.core.gpus import need_gpus
from tokenferry.bench.profile.diagnose import Verdict, judge, show_ns
from tokenferry.bench.profile.iterations import Waited, count_waits
from tokenferry.bench.profile.timeline import row_waits, stacked
from tokenferry.bench.report import cpu as report
from tokenferry.bench.report.heatmap import plot_waits
from tokenferry.bench.report.plots import need_matplotlib
from tokenferry.cli.failure import explain
from tokenferry.cli.options import positive
from tokenferry.cli.screen import Screen
from tokenferry.cli.trace import make_spec, sizes
from tokenferry.errors import ConfigError
from tokenferry.testing.world import World, WorldError

HELP = "say which rank the others wait for, and whether it is slow in compute or in its link"
DESCRIPTION = """\
Starts R ranks on this host, checks that rows come home right, runs rounds of decode_dispatch and decode_combine, and
adds up how long each rank waited for the messages of each other one (DecodeStats.wait_ns). Prints that as a table, rank
by rank, and says who holds the others up. On GPUs the kernels also write down when the rows of each rank came: a rank
whose messages come late is slow in compute; one whose messages come in time and whose rows come late is slow in its
link. On CPUs the two cannot be told apart.

--slow-rank and --slow-us make one rank late on purpose, to see what that looks like.
`tokenferry.bench.profile.diagnose.judge` gives the same verdict on an application's own counters.
"""
JOB_TIMEOUT_S = 300.0
DEFAULTS = {
    "cpu": {"ranks": 4, "tokens": 16, "hidden": 512, "top_k": 4, "experts": 32},
    "cuda": {"tokens": 128, "hidden": 7168, "top_k": 8, "experts": 256},
}
SHADES = " ░▒▓█"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--ranks", type=positive, help="R (default: 4; on GPUs one on each, at most 8)")
    for option, letter in (("tokens", "T, on every rank"), ("hidden", "H"), ("top-k", "K"), ("experts", "E")):
        cpu, cuda = (DEFAULTS[device][option.replace("-", "_")] for device in ("cpu", "cuda"))
        parser.add_argument(f"--{option}", type=positive, help=f"{letter} (default: {cpu}; on GPUs {cuda})")
    parser.add_argument("--rounds", type=positive, default=50, help="rounds that count (default: 50)")
    parser.add_argument("--slow-rank", type=int, metavar="RANK", help="a rank that is busy before each round")
    parser.add_argument("--slow-us", type=positive, metavar="US", help="for how many microseconds")
    parser.add_argument("--seed", type=int, help="of the inputs (default: another one each time)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to FILE as well")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write waits.png into FOLDER; needs matplotlib")


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Count, print, judge; 1 if a rank failed. A slow rank is a finding, not a failure."""
    there_are = need_gpus() if args.device == "cuda" else 0
    if args.plot is not None:
        need_matplotlib()
    defaults = {"ranks": min(there_are, 8), **DEFAULTS[args.device]}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    spec = make_spec(args, args.ranks, iters=args.rounds)
    slow = slowed(args)
    title = f"backend {args.device}, {sizes(spec)}, {spec.iters} rounds"
    screen.line(f"tokenferry {tokenferry.__version__}, commit {report.commit() or 'unknown'}")
    screen.line(f"command: {args.command_line}")
    screen.line(title)
    try:
        with World(spec.ranks, devices=args.device, timeout_s=JOB_TIMEOUT_S) as world:
            found = world.run(count_waits, args.device, spec, slow)
    except WorldError as error:
        screen.line(f"{explain(error)}\nnothing was counted", style="bold red")
        return 1
    tables, took_ns = put_together(found, spec.iters)
    verdict = judge_all(tables, took_ns)
    show(tables, verdict, took_ns, screen)
    if args.plot is not None:
        for file in plot_waits({name: (ns / 1e3).tolist() for name, ns in tables.items()}, args.plot, title):
            screen.line(f"written: {file}")
    if args.json is not None:
        whole = {"command": args.command_line, "title": title, **as_json(tables, verdict, took_ns)}
        args.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        screen.line(f"written: {args.json}")
    return 0


def slowed(args: argparse.Namespace) -> tuple[int, float]:
    """The rank that is to be slow, and the seconds; (-1, 0.0): none.

    Raises:
        ConfigError: one of the two options is missing, or there is no such rank.
    """
    if args.slow_rank is None and args.slow_us is None:
        return -1, 0.0
    if args.slow_rank is None or args.slow_us is None:
        raise ConfigError("--slow-rank and --slow-us: one makes no sense without the other; give both")
    if not 0 <= args.slow_rank < args.ranks:
        raise ConfigError(f"--slow-rank {args.slow_rank}: expected one of 0..{args.ranks - 1}")
    return args.slow_rank, args.slow_us / 1e6


WAITS = ("decode_dispatch", "decode_combine")
ROWS = "rows of decode_dispatch"


def put_together(found: Sequence[Waited], rounds: int) -> tuple[dict[str, Tensor], float]:
    """Nanoseconds a round, ``[R, R]``, by `WAITS` and, where kernels write it down, `ROWS`; and what a round took."""
    counted = (torch.stack([one.dispatch_ns for one in found]), torch.stack([one.combine_ns for one in found]))
    tables = {name: ns.double() / rounds for name, ns in zip(WAITS, counted, strict=True)}
    words = [one.words for one in found if one.words is not None]
    if words:
        tables[ROWS] = row_waits(stacked(words))
    return tables, max(one.took_ns for one in found) / rounds


def judge_all(tables: Mapping[str, Tensor], took_ns: float) -> Verdict:
    """The verdict on both calls together."""
    return judge(tables[WAITS[0]] + tables[WAITS[1]], tables.get(ROWS), took_ns=took_ns)


def show(tables: Mapping[str, Tensor], verdict: Verdict, took_ns: float, screen: Screen) -> None:
    """Print the heat maps and the verdict."""
    hottest = max(float(tables[name].max()) for name in WAITS)
    for name, ns in tables.items():
        most = hottest if name in WAITS else float(ns.max())
        what = "waited for messages of" if name in WAITS else "after all messages, for the last row of"
        heat = [[0.0, *(value / most if most else 0.0 for value in row)] for row in ns.tolist()]
        rows = [
            [
                f"rank {r}",
                *("-" if s == r else f"{value / 1e3:.1f} {shade(heat[r][s + 1])}" for s, value in enumerate(row)),
            ]
            for r, row in enumerate(ns.tolist())
        ]
        header = ["", *(f"rank {s}" for s in range(len(rows)))]
        screen.table(f"{name}, us a round: who {what} whom", header, rows, heat=heat)
    screen.line(f"a round took {show_ns(took_ns)}")
    for line in verdict.lines():
        screen.line(line, style="bold red" if verdict.slow else "green")


def shade(heat: float) -> str:
    """One character for 0 to 1."""
    return SHADES[round(heat * (len(SHADES) - 1))]


def as_json(tables: Mapping[str, Tensor], verdict: Verdict, took_ns: float) -> dict[str, Any]:
    """The report as plain dicts; times in nanoseconds a round."""
    return {
        "schema": 1,
        "tokenferry": tokenferry.__version__,
        "machine": report.machine(),
        "round_ns": took_ns,
        "tables_ns": {name: ns.tolist() for name, ns in tables.items()},
        "late_ns": list(verdict.late_ns),
        "slow": [
            {"rank": one.rank, "where": one.where.value, "late_ns": one.late_ns, "peers": list(one.peers)}
            for one in verdict.slow
        ],
        "verdict": verdict.lines(),
    }
