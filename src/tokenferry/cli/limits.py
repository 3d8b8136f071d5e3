"""`tokenferry limits`: the rates of the links between the GPUs of this host."""

from __future__ import annotations

import argparse
import secrets
from dataclasses import asdict
from typing import Any

from tokenferry.bench.core.gpus import Gpus, find_gpus, need_gpus
from tokenferry.bench.report import about
from tokenferry.bench.report.plots import need_matplotlib, plot_limits
from tokenferry.bench.suites.limits import Limits, LimitSettings, measure_limits, num_steps
from tokenferry.cli.failure import explain, status
from tokenferry.cli.options import SIZES, positive
from tokenferry.cli.output import add_json, output_folder, write_json
from tokenferry.cli.screen import Screen
from tokenferry.errors import ConfigError, several
from tokenferry.testing.world import World, WorldError

DESCRIPTION = """\
Starts one rank on each GPU and lets all of them store rows into, and load rows from, the memory of all others at the
same time, with different numbers of SMs: the limit that dispatch and combine are compared with. Measures flags,
barriers and local copies too. The rows moved are compared before anything is timed.

Each rate is that of the slowest rank, the median over runs; in each run ranks start together, after a barrier on the
devices. Uses neither NVLink multicast nor copy engines.
"""
JOB_TIMEOUT_S = 120.0
BYTES = "store, load: bytes of rows that leave each GPU; copy: bytes read and bytes written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--ranks", type=positive, help=f"{SIZES['ranks']}, at most 8 (default: one on each GPU)")
    parser.add_argument("--runs", type=positive, default=5, help="runs that count, of each point (default: 5)")
    add_json(parser)
    parser.add_argument(
        "--plot", type=output_folder, metavar="FOLDER", help="write limits.png into FOLDER; needs matplotlib"
    )


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Measure, print; 1 if rows were wrong or the GPUs cannot reach each other."""
    if args.ranks is not None and args.ranks > 8:
        raise ConfigError(f"--ranks {args.ranks}: windows reach at most 8 ranks of one host")
    available = need_gpus()
    ranks = args.ranks or min(available, 8)
    if args.plot is not None:
        need_matplotlib()
    gpus = find_gpus()
    screen.line(f"{gpus.line()}, {several(ranks, 'rank')}")
    for line in about.lines(args.command_line):
        screen.line(line, whole=line.startswith("command: "))
    settings = LimitSettings(runs=args.runs, seed=secrets.randbits(31))
    try:
        with World(ranks, devices="cuda", timeout_s=JOB_TIMEOUT_S) as world:
            limits = measure_in(world, settings, screen)
    except WorldError as error:
        screen.line(f"{explain(error)}\nno rate is printed", style="bold red")
        return status(error)
    show(limits, screen)
    if args.json is not None:
        write_json(as_json(limits, settings, gpus, args.command_line), args.json, screen)
    if args.plot is not None:
        for file in plot_limits(limits, args.plot, f"{gpus.line()}, {several(ranks, 'rank')}"):
            screen.line(f"written: {file}")
    return 0


def measure_in(world: World, settings: LimitSettings, screen: Screen) -> Limits:
    """Measure in a world of ranks with GPUs, with progress.

    Raises:
        WorldError: a rank failed.
    """
    with screen.progress("limits", num_steps(settings)) as advance:
        answers = world.run_with_progress(measure_limits, settings, on_item=lambda item: advance(1, item["now"]))
    found: Limits = answers[0]
    return found


def show(limits: Limits, screen: Screen) -> None:
    """Print the tables."""
    sizes = sorted({rate.row_bytes for rate in limits.rates})
    kinds = [(kind, size) for size in sizes for kind in ("store", "load", "copy")]
    header = ["SMs", *(f"{kind} {size} B" for kind, size in kinds)]
    counts = sorted({rate.num_sms for rate in limits.rates})
    rows = [[str(count), *(_rate(limits.at(kind, count, size)) for kind, size in kinds)] for count in counts]
    screen.table(f"GB/s, every rank at once, {several(limits.num_ranks, 'rank')}", header, rows)
    screen.line(f"{BYTES}; every row was compared")
    if limits.flag_us is not None and limits.barrier_us is not None:
        screen.line(f"flag, one way: {limits.flag_us:.2f} us")
        screen.line(f"barrier of {several(limits.num_ranks, 'rank')}: {limits.barrier_us:.2f} us")
    best = {kind: limits.best(kind) for kind in ("store", "load", "copy")}
    screen.line(f"best: store {best['store']:.0f}, load {best['load']:.0f}, local copy {best['copy']:.0f} GB/s")


def as_json(limits: Limits, settings: LimitSettings, gpus: Gpus, command: str) -> dict[str, Any]:
    """Return the whole report as plain dicts."""
    return {
        "schema": 2,
        **about.about(command),
        "gpus": {"count": gpus.count, "name": gpus.name, "cuda": gpus.torch_cuda, "smi": list(gpus.smi)},
        "bytes": BYTES,
        "settings": asdict(settings),
        "limits": asdict(limits),
    }


def _rate(gbps: float | None) -> str:
    return "-" if gbps is None else f"{gbps:.1f}"
