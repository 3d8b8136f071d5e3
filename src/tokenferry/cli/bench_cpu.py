"""`tokenferry bench cpu`: calls of the CPU backend against plain all_to_all_single of the same bytes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

from tokenferry.bench.core.session import Settings, in_session
from tokenferry.bench.report import about, tables
from tokenferry.bench.report.report import CPU_NOTES, Report
from tokenferry.bench.suites.cpu_calls import RUNS, calls_for, measure_cpu_calls
from tokenferry.cli.bench_settings import CPU_BACKEND_RANKS, common_settings, fill_sizes
from tokenferry.cli.failure import explain, status
from tokenferry.cli.output import write_json
from tokenferry.cli.screen import Screen
from tokenferry.errors import ConfigError
from tokenferry.testing.world import World, WorldError
from tokenferry.types import TransportName

JOB_TIMEOUT_S = 1800.0


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Check, measure, print; 1 if an answer was wrong."""
    settings = _settings(args)
    threads = args.threads or about.threads_for(settings.ranks)
    report = Report(settings, {**about.about(args.command_line), "threads_per_rank": threads}, CPU_NOTES)
    machine = report.about["machine"]
    screen.line(f"{machine['processor']}, {machine['cores']} cores (load {machine['load']}), {machine['system']}")
    for line in about.lines(args.command_line):
        screen.line(line, whole=line.startswith("command: "))
    screen.line(
        f"{settings.sizes(settings.tokens[0])} bfloat16, {settings.iterations} iterations, {threads} thread(s) a rank"
    )
    try:
        with World(settings.ranks, timeout_s=JOB_TIMEOUT_S, threads=threads) as world:
            for transport in _transports(args.transport, settings.ranks):
                _measure(world, report, transport, screen)
    except WorldError as error:
        screen.line(f"{explain(error)}\nno time is printed", style="bold red")
        return status(error)
    screen.note(f"MB/rank: {CPU_NOTES['bytes']}. GB/s: these over the median.")
    if args.json is not None:
        write_json(report.as_json(), args.json, screen)
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    fill_sizes(args, CPU_BACKEND_RANKS)
    if len(args.tokens) > 1:
        raise ConfigError(f"--tokens {','.join(map(str, args.tokens))}: this part measures one T; choose one")
    if args.hidden % 8:
        raise ConfigError(f"--hidden {args.hidden}: a row has to be a multiple of 16 bytes; use a multiple of 8")
    return replace(common_settings(args), runs=RUNS)


def _transports(option: str, ranks: int) -> tuple[TransportName, ...]:
    """Return the transports to measure; a group of one rank has none, so that it is measured once."""
    both: tuple[TransportName, ...] = ("shared_memory", "process_group")
    return ("auto",) if ranks == 1 else tuple(one for one in both if option in ("both", one))


def _measure(world: World, report: Report, transport: TransportName, screen: Screen) -> None:
    before = len(report.results)
    title = f"transport {transport}" if report.settings.ranks > 1 else "one rank, which has no transport"
    with screen.progress(title, 1 + len(calls_for(report.settings))) as advance:

        def take(item: dict[str, Any]) -> None:
            if "now" in item:
                advance(1, item["now"])
            else:
                report.take(item)

        measure = partial(measure_cpu_calls, transport=transport)
        world.run_with_progress(in_session, report.settings, measure, on_item=take)
    screen.line(f"checked: {CPU_NOTES['checked']}")
    rows = tables.baseline_rows(report.results[before:])
    screen.table(title, tables.BASELINE_HEADER, rows)
    screen.line()
