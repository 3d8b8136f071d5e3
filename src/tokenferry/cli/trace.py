"""`tokenferry trace`: one decode call on all GPUs, as a timeline."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenferry import env
from tokenferry.bench.core.gpus import find_gpus, need_gpus
from tokenferry.bench.core.inputs import Sizes
from tokenferry.bench.profile.iterations import CALIBRATIONS, record_calls
from tokenferry.bench.profile.timeline import (
    PHASES,
    Clocks,
    Recorded,
    aligned,
    events,
    find_clocks,
    rank_times,
    stacked,
)
from tokenferry.bench.report import about
from tokenferry.cli.failure import explain, status
from tokenferry.cli.options import SIZES, check_experts, check_fp8, integer, positive, seed_of
from tokenferry.cli.output import output_file, write_json
from tokenferry.cli.screen import Screen
from tokenferry.errors import ConfigError, page_place, several
from tokenferry.testing.world import World, WorldError

DESCRIPTION = """\
Starts one rank on each GPU, checks that rows come home right, makes some decode calls back to back in a CUDA graph and
records the last one: when each block of each rank had space at its peers, had sent its rows, had the counts of all, was
done; when the message and the last row of each rank had arrived. Writes that as a file for https://ui.perfetto.dev or
chrome://tracing (a process a rank, a thread a block), and prints how long each phase took.

The GPUs' clocks are aligned by the calls themselves, as NTP does; a bound of the error is printed. Kernels write time
stamps only while they are recorded.
"""
JOB_TIMEOUT_S = 180.0
CALLS = {
    "decode_dispatch": ("decode_dispatch",),
    "decode_combine": ("decode_combine",),
    "pair": ("decode_dispatch", "decode_combine"),
}
HEADER = ("rank", "begins", "lasts", *PHASES.values(), "waited longest for")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--ranks", type=positive, help=f"{SIZES['ranks']}, at most 8 (default: one on each GPU)")
    parser.add_argument("--tokens", type=positive, default=128, help=f"{SIZES['tokens']} (default: 128)")
    parser.add_argument("--hidden", type=positive, default=7168, help=f"{SIZES['hidden']} (default: 7168)")
    parser.add_argument("--top-k", type=positive, default=8, help=f"{SIZES['top_k']} (default: 8)")
    parser.add_argument("--experts", type=positive, default=256, help=f"{SIZES['experts']} (default: 256)")
    parser.add_argument("--call", choices=tuple(CALLS), default="pair", help="what to record (default: pair)")
    parser.add_argument("--seed", type=integer, help="seed of the inputs (default: another one each time)")
    parser.add_argument(
        "--json",
        type=output_file,
        metavar="FILE",
        default="trace.json",
        help="the timeline (default: trace.json); -: to standard output, and the text to standard error",
    )


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Record, print, write; 1 if a rank failed."""
    sizes = make_sizes(args, args.ranks or min(need_gpus(), 8))
    gpus = find_gpus()
    screen.line(f"{gpus.line()}, {several(sizes.ranks, 'rank')}")
    for line in about.lines(args.command_line):
        screen.line(line, whole=line.startswith("command: "))
    screen.line(str(sizes))
    try:
        with World(sizes.ranks, devices="cuda", timeout_s=JOB_TIMEOUT_S) as world:
            found = world.run(record_calls, sizes, CALLS[args.call])
    except WorldError as error:
        screen.line(f"{explain(error)}\nnothing was recorded", style="bold red")
        return status(error)
    clocks, calls = put_together(found, CALLS[args.call])
    show(clocks, calls, screen)
    about_run = {**about.about(args.command_line), "sizes": str(sizes)}
    note = "; open it in https://ui.perfetto.dev"
    write_json(as_json(clocks, calls, about_run), args.json, screen, note=note)
    return 0


def make_sizes(args: argparse.Namespace, ranks: int) -> Sizes:
    """Return the sizes that the options ask for.

    Raises:
        ConfigError: sizes do not fit one another, or ranks are to be several nodes.
    """
    if ranks > 8 and getattr(args, "device", "cuda") == "cuda":
        raise ConfigError(f"--ranks {ranks}: windows reach at most 8 ranks of one host")
    per_node = env.read_one("ranks_per_node")
    if per_node is not None and per_node < ranks:
        raise ConfigError(
            f"TOKENFERRY_RANKS_PER_NODE={per_node} makes several nodes of {ranks} ranks, and this needs ranks of one; "
            f"unset it; see {page_place('diagnosing')}"
        )
    check_experts(args, ranks)
    check_fp8(args)
    return Sizes(ranks, args.tokens, args.hidden, args.top_k, args.experts, seed_of(args))


def put_together(found: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> tuple[Clocks, list[Recorded]]:
    """Put the records of all ranks on one clock."""
    clocks = find_clocks(stacked([one["clocks"] for one in found]))
    calls = [Recorded(name, stacked([one[name] for one in found])) for name in names]
    return clocks, [aligned(call, clocks) for call in calls]


def show(clocks: Clocks, calls: Sequence[Recorded], screen: Screen) -> None:
    """Print a table for each call."""
    for call in calls:
        screen.table(f"{call.name}, us (phases: median / maximum over blocks)", HEADER, cells(call))
    offsets = ", ".join(f"{offset / 1e3:.2f}" for offset in clocks.offset_ns)
    screen.line(
        f"clocks of the ranks relative to that of rank 0: {offsets} us (from {CALIBRATIONS} calls; "
        f"error at most {clocks.error_ns / 1e3:.2f} us)"
    )


def cells(call: Recorded) -> list[list[str]]:
    """Return one row a rank, under `HEADER`."""
    rows = []
    for one in rank_times(call):
        spans = [one.phases.get(name) for name in PHASES.values()]
        longest = one.waited_longest
        waited = "-" if longest is None else f"rank {longest}: {one.waits_us[longest]:.1f}"
        times = ["-" if span is None else f"{span[0]:.1f} / {span[1]:.1f}" for span in spans]
        rows.append([str(one.rank), f"{one.late_us:.1f}", f"{one.lasts_us:.1f}", *times, waited])
    return rows


def as_json(clocks: Clocks, calls: Sequence[Recorded], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of the file: trace events, and what they belong to."""
    return {
        "traceEvents": events(calls),
        "displayTimeUnit": "ns",
        "otherData": {
            **about,
            "clock_offsets_ns": list(clocks.offset_ns),
            "clock_error_at_most_ns": clocks.error_ns,
        },
    }
