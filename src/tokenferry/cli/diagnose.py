"""`tokenferry diagnose`: the rank that the others wait for, and why."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenferry.bench.core.gpus import need_gpus
from tokenferry.bench.profile.diagnose import Verdict, judge, show_ns
from tokenferry.bench.profile.iterations import CountSettings, Slowed, Waited, count_waits
from tokenferry.bench.profile.timeline import row_waits, stacked
from tokenferry.bench.report import about
from tokenferry.bench.report.heatmap import plot_waits
from tokenferry.bench.report.plots import need_matplotlib
from tokenferry.cli.failure import explain, status
from tokenferry.cli.options import SIZES, integer, positive
from tokenferry.cli.output import add_json, output_folder, write_json
from tokenferry.cli.screen import Screen
from tokenferry.cli.trace import make_sizes
from tokenferry.errors import ConfigError
from tokenferry.testing.world import World, WorldError

DESCRIPTION = """\
Starts R ranks on this host, checks that rows come home right, runs iterations of decode_dispatch and decode_combine,
and adds up how long each rank waited for the messages of each other one (DecodeStats.wait_ns). Prints that as a table,
rank by rank, and names the ranks that hold the others up. On GPUs the kernels also record when the rows of each rank
came: a rank whose messages come late is slow in compute; one whose messages come in time and whose rows come late is
slow in its link. On CPUs the two cannot be told apart.

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
    parser.add_argument("--ranks", type=positive, help=f"{SIZES['ranks']} (default: 4; on GPUs one on each, at most 8)")
    for name in ("tokens", "hidden", "top_k", "experts"):
        cpu, cuda = (DEFAULTS[device][name] for device in ("cpu", "cuda"))
        option, text = f"--{name.replace('_', '-')}", f"{SIZES[name]} (default: {cpu}; on GPUs {cuda})"
        parser.add_argument(option, type=positive, help=text)
    parser.add_argument("--iterations", type=positive, default=50, help="iterations that count (default: 50)")
    parser.add_argument("--slow-rank", type=integer, metavar="RANK", help="a rank that is busy before each iteration")
    parser.add_argument("--slow-us", type=positive, metavar="US", help="for how many microseconds")
    parser.add_argument("--seed", type=integer, help="seed of the inputs (default: another one each time)")
    add_json(parser)
    parser.add_argument(
        "--plot", type=output_folder, metavar="FOLDER", help="write waits.png into FOLDER; needs matplotlib"
    )


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Count, print, judge; 1 if a rank failed. A slow rank is a finding, not a failure."""
    available = need_gpus() if args.device == "cuda" else 0
    if args.plot is not None:
        need_matplotlib()
    defaults = {"ranks": min(available, 8), **DEFAULTS[args.device]}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    settings = CountSettings(make_sizes(args, args.ranks), args.iterations, args.device, slowed(args))
    title = f"backend {args.device}, {settings.sizes}, {settings.iterations} iterations"
    for line in about.lines(args.command_line):
        screen.line(line, whole=line.startswith("command: "))
    screen.line(title)
    try:
        with World(args.ranks, devices=args.device, timeout_s=JOB_TIMEOUT_S) as world:
            found = world.run(count_waits, settings)
    except WorldError as error:
        screen.line(f"{explain(error)}\nnothing was counted", style="bold red")
        return status(error)
    waits = put_together(found, settings.iterations)
    verdict = judge_all(waits)
    show(waits, verdict, screen)
    if args.plot is not None:
        for file in plot_waits({name: (ns / 1e3).tolist() for name, ns in waits.tables.items()}, args.plot, title):
            screen.line(f"written: {file}")
    if args.json is not None:
        report = {"schema": 2, "title": title, **about.about(args.command_line), **as_json(waits, verdict)}
        write_json(report, args.json, screen)
    return 0


def slowed(args: argparse.Namespace) -> Slowed:
    """Return the rank that is late on purpose.

    Raises:
        ConfigError: one of the two options is missing, or there is no such rank.
    """
    if args.slow_rank is None and args.slow_us is None:
        return Slowed()
    if args.slow_rank is not None and not 0 <= args.slow_rank < args.ranks:
        raise ConfigError(f"--slow-rank {args.slow_rank}: expected one of 0..{args.ranks - 1}, of --ranks {args.ranks}")
    if args.slow_rank is None or args.slow_us is None:
        raise ConfigError("--slow-rank and --slow-us: one makes no sense without the other; give both")
    return Slowed(args.slow_rank, args.slow_us / 1e6)


WAITS = ("decode_dispatch", "decode_combine")
ROWS = "rows of decode_dispatch"


@dataclass(frozen=True, slots=True, eq=False)
class Waits:
    """The waits of all ranks.

    Attributes:
        tables: ``[R, R]`` nanoseconds an iteration, by `WAITS` and, where kernels record it, `ROWS`.
        took_ns: The time of an iteration.
    """

    tables: Mapping[str, Tensor]
    took_ns: float


def put_together(found: Sequence[Waited], iterations: int) -> Waits:
    """Put the waits of all ranks together."""
    counted = (torch.stack([one.dispatch_ns for one in found]), torch.stack([one.combine_ns for one in found]))
    tables = {name: ns.double() / iterations for name, ns in zip(WAITS, counted, strict=True)}
    words = [one.words for one in found if one.words is not None]
    if words:
        tables[ROWS] = row_waits(stacked(words))
    return Waits(tables, max(one.took_ns for one in found) / iterations)


def judge_all(waits: Waits) -> Verdict:
    """Return the verdict on both calls together."""
    tables = waits.tables
    return judge(tables[WAITS[0]] + tables[WAITS[1]], tables.get(ROWS), took_ns=waits.took_ns)


def show(waits: Waits, verdict: Verdict, screen: Screen) -> None:
    """Print the heat maps and the verdict."""
    hottest = max(float(waits.tables[name].max()) for name in WAITS)
    for name, ns in waits.tables.items():
        most = hottest if name in WAITS else float(ns.max())
        what = "wait for messages of" if name in WAITS else "after all messages, wait for the last row of"
        heat = [[0.0, *(value / most if most else 0.0 for value in row)] for row in ns.tolist()]
        rows = [
            [
                f"rank {r}",
                *("-" if s == r else f"{value / 1e3:.1f} {shade(heat[r][s + 1])}" for s, value in enumerate(row)),
            ]
            for r, row in enumerate(ns.tolist())
        ]
        header = ["waits for", *(f"rank {s}" for s in range(len(rows)))]
        screen.table(f"{name}, us an iteration: {what} each rank", header, rows, heat=heat)
    screen.line(f"an iteration took {show_ns(waits.took_ns)}")
    for line in verdict.lines():
        screen.line(line, style="bold red" if verdict.slow else "green")


def shade(heat: float) -> str:
    """Return one character for 0 to 1."""
    return SHADES[round(heat * (len(SHADES) - 1))]


def as_json(waits: Waits, verdict: Verdict) -> dict[str, Any]:
    """Return the results as plain dicts; times in nanoseconds an iteration."""
    return {
        "iteration_ns": waits.took_ns,
        "tables_ns": {name: ns.tolist() for name, ns in waits.tables.items()},
        "late_ns": list(verdict.late_ns),
        "slow": [
            {"rank": one.rank, "where": one.where.value, "late_ns": one.late_ns, "peers": list(one.peers)}
            for one in verdict.slow
        ],
        "verdict": verdict.lines(),
    }
