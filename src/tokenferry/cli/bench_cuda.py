"""`tokenferry bench --device cuda`: which phases there are, each in ranks that may fail without ending the others."""

from __future__ import annotations

import argparse
import dataclasses
import secrets
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenferry
from tokenferry.bench.baselines import nccl, vdev
from tokenferry.bench.core.gpus import find_gpus, need_gpus
from tokenferry.bench.core.progress import run_with_feed
from tokenferry.bench.core.session import Settings
from tokenferry.bench.core.static_inputs import ROUTINGS
from tokenferry.bench.report import cpu as report
from tokenferry.bench.report import decode as decode_report
from tokenferry.bench.report import gpu as gpu_report
from tokenferry.bench.report.gpu import Report
from tokenferry.bench.report.plots import need_matplotlib
from tokenferry.bench.suites import calls, decode, first_call, limits, overlap
from tokenferry.bench.suites import host_time as hosttime
from tokenferry.bench.suites import two_batch_overlap as micro
from tokenferry.cli import limits as cli_limits
from tokenferry.cli.failure import explain
from tokenferry.cli.options import check_experts, check_fp8, one_of, positive, positives
from tokenferry.cli.screen import Screen
from tokenferry.errors import ConfigError
from tokenferry.testing.world import World, WorldError

QUICK_TOKENS = (128, 1024, 4096, 8192)
FULL_TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384)
FULL_SMS = (4, 8, 12, 16, 20, 24, 32, 48)
SWEEP_TOKENS = 4096
QUICK_DECODE_TOKENS = (1, 128)
FULL_DECODE_TOKENS = (1, 8, 32, 64, 128, 256, 512)
MOST_DECODE_TOKENS = 1024
"""Beyond, room for the worst case at every expert is more than GPUs have."""

QUICK_LIMITS = limits.Plan(num_sms=(8, 12, 16, 24, 64, 132), runs=3, rounds=500)

Job = Callable[..., Any]
PHASES: dict[str, tuple[Job, float, str]] = {
    "limits": (limits.measure_limits, 60.0, "what the links do"),
    "calls": (calls.measure_calls, 150.0, "dispatch and combine for every T, and other routings"),
    "nccl": (nccl.measure_nccl, 90.0, nccl.WHAT),
    "host": (hosttime.measure_host, 60.0, "host time of eager calls; a pair in a CUDA graph"),
    "decode": (
        decode.measure_decode,
        180.0,
        "decode calls: graphs, eager, drained, chained, hooks; brings limits with it",
    ),
    "micro": (micro.measure_micro, 60.0, "two micro-batches of decoding, overlapped by hooks"),
    "sms": (calls.measure_sms, 90.0, "dispatch and combine for every number of SMs"),
    "overlap": (overlap.measure_overlap, 180.0, "communication beside expert GEMMs"),
    "memory": (hosttime.measure_memory, 60.0, "device memory of a group"),
    "start": (first_call.run_both, 240.0, "the first call of a process"),
    "vdev": (vdev.measure_vdev, 60.0, "torch's symm_mem.all_to_all_vdev_2d, at 16 experts a rank"),
}
"""Name, job, seconds that it may take, what it measures."""

RIVALS = ("nccl", "vdev_2d", "phase nccl", "phase vdev")
"""What may fail without this command failing: software that need not be there."""

QUICK_PHASES = ("limits", "calls", "nccl", "host", "decode", "memory", "start")
DECODE_PHASES = ("limits", "decode", "micro")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that only GPUs have."""
    phases = "; ".join(f"{name}: {what}" for name, (_, _, what) in PHASES.items())
    only = parser.add_argument_group("with --device cuda")
    only.add_argument("--quick", action="store_true", help="the cases of the targets only: about a minute")
    only.add_argument("--sms", type=positives, help="values of num_sms to sweep over, as 8,16,24")
    only.add_argument("--routing", type=one_of(*ROUTINGS), help=f"with commas between them: {', '.join(ROUTINGS)}")
    only.add_argument("--only", type=one_of(*PHASES), metavar="PHASES", help=f"with commas between them: {phases}")
    only.add_argument("--plot", metavar="FOLDER", type=Path, help="write pictures; needs matplotlib")
    only.add_argument(
        "--micro-tokens", type=positive, default=128, help="T of both micro-batches together (default: 128)"
    )


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Measure, print; 1 if a case of tokenferry failed."""
    there_are = need_gpus() if args.device == "cuda" else 0
    if args.plot is not None:
        need_matplotlib()
    gpus = find_gpus()
    settings = make_settings(args, there_are)
    phases = choose_phases(args)
    title = (
        f"{gpus.count} x {gpus.name}, R={settings.ranks} H={settings.hidden} K={settings.top_k} E={settings.experts}"
    )
    about = gpu_report.about(args.command_line, dataclasses.asdict(gpus), title)
    whole = Report(settings, about, args.json)
    whole.write()  # a folder that is not there is noticed now
    screen.line(gpus.line())
    screen.line(
        f"tokenferry {tokenferry.__version__}, commit {report.commit() or 'unknown'}, torch {report.machine()['torch']}"
    )
    screen.line(f"command: {args.command_line}")
    screen.line(f"{title}, seed {settings.seed}, {settings.iters} iterations")
    quick = args.quick or bool(args.what or (args.only and "limits" not in args.only))
    worlds = Worlds(settings, screen, whole, QUICK_LIMITS if quick else limits.Plan())
    try:
        for name in phases:
            worlds.phase(name)
    finally:
        worlds.close()
    whole.about["gpus_after"] = [dict(one) for one in find_gpus().smi]
    show(whole, screen)
    if args.plot is not None:
        for file in whole.draw(args.plot):
            screen.line(f"written: {file}")
    if args.json is not None:
        whole.write()
        screen.line(f"written: {args.json}")
    show_short(whole, screen)
    return 1 if any(not one["what"].startswith(RIVALS) for one in whole.failed) else 0


def choose_phases(args: argparse.Namespace) -> tuple[str, ...]:
    """What to measure, in order.

    Raises:
        ConfigError: the options ask for different things.
    """
    if args.what and args.only:
        raise ConfigError(f"{args.what} and --only {','.join(args.only)}: choose one of them")
    if args.what:
        return DECODE_PHASES
    chosen: tuple[str, ...] = args.only or (QUICK_PHASES if args.quick else tuple(PHASES))
    return chosen if "limits" in chosen or "decode" not in chosen else ("limits", *chosen)


def make_settings(args: argparse.Namespace, there_are: int) -> Settings:
    """What the options ask for.

    Raises:
        ConfigError: sizes do not fit one another.
    """
    ranks = args.ranks or max(1, min(there_are, 8))
    check_experts(args, ranks)
    check_fp8(args)
    tokens = args.tokens or (QUICK_TOKENS if args.quick else FULL_TOKENS)
    decode_tokens = tuple(count for count in args.tokens or () if count <= MOST_DECODE_TOKENS)
    return Settings(
        ranks=ranks,
        tokens=tokens,
        hidden=args.hidden,
        top_k=args.top_k,
        experts=args.experts,
        sms=FULL_SMS if args.sms is None else args.sms,
        sweep_tokens=SWEEP_TOKENS if SWEEP_TOKENS in tokens else max(tokens),
        routings=args.routing or (("uniform",) if args.quick else ("uniform", "skewed")),
        iters=args.iters,
        warmup=max(1, min(5, args.iters)),
        seed=secrets.randbits(31) if args.seed is None else args.seed % 2**31,
        device=args.device,
        decode_tokens=decode_tokens or (QUICK_DECODE_TOKENS if args.quick else FULL_DECODE_TOKENS),
        micro_tokens=args.micro_tokens,
    )


class Worlds:
    """Ranks for one phase after another: new ones when a phase has lost them."""

    def __init__(self, settings: Settings, screen: Screen, whole: Report, plan: limits.Plan) -> None:
        self._settings, self._screen, self._whole = settings, screen, whole
        self._plan = dataclasses.replace(plan, seed=settings.seed)
        self._world: World | None = None

    def phase(self, name: str) -> None:
        """Run one phase; what fails is shown and remembered."""
        job, timeout_s, what = PHASES[name]
        self._screen.line(f"-- {name}: {what}")
        start = time.monotonic()
        try:
            if name == "start":
                self._whole.take({"first call": first_call.run_both(self._settings.device)})
            elif name == "limits":
                found = run_with_feed(self._alive(timeout_s), job, self._plan, on_item=lambda item: None)[0]
                self._whole.limits = found
                cli_limits.show(found, self._screen)
                self._whole.write()
            else:
                run_with_feed(self._alive(timeout_s), job, self._settings, on_item=self._show)
        except WorldError as error:
            self._lost(name, explain(error))
        except (OSError, subprocess.SubprocessError) as error:
            self._lost(name, f"{type(error).__name__}: {error}")
        self._screen.line(f"-- {name}: {time.monotonic() - start:.1f} s")

    def close(self) -> None:
        """End the ranks."""
        if self._world is not None:
            self._world.close()

    def _alive(self, timeout_s: float) -> World:
        if self._world is None or not self._world.alive:
            self._world = World(self._settings.ranks, devices=self._settings.device, timeout_s=timeout_s)
        self._world.timeout_s = timeout_s
        return self._world

    def _show(self, item: dict[str, Any]) -> None:
        line = self._whole.take(item)
        if line:
            self._screen.line(line)

    def _lost(self, name: str, why: str) -> None:
        self._whole.fail(f"phase {name}", why)
        self._screen.line(f"FAILED phase {name}: {why}", style="bold red")


def show(whole: Report, screen: Screen) -> None:
    """Print everything."""
    screen.line()
    if whole.results:
        screen.table("all cases, median us", gpu_report.HEADER, [whole.cells(result) for result in whole.results])
        screen.line(f"MB out: {gpu_report.BYTES}. of limit: against the best rate of the links in this run.")
        screen.line(f"drained: {gpu_report.DRAINED}")
        screen.line(f"checked: {gpu_report.CHECKED}")
    show_decode(whole, screen)
    if "overlap" in whole.others:
        screen.table("overlap", gpu_report.OVERLAP_HEADER, gpu_report.overlap_rows(whole.others["overlap"]))
    for line in gpu_report.kernel_lines(whole.others.get("gemm kernels", [])):
        screen.line(line)
    for item in whole.others.get("overlap left out", []):
        screen.line(f"overlap beside {item['gemm']}, {item['carve_out']} SMs left out: not measured: {item['why']}")
    if "host" in whole.others:
        screen.table("host", gpu_report.HOST_HEADER, gpu_report.host_rows(whole.others["host"]))
    for item in whole.others.get("memory", []):
        screen.line("memory of a group: " + ", ".join(f"{name} {value:.1f}" for name, value in item.items()))
    for item in whole.others.get("first call", []):
        for name, seconds in item.items():
            screen.line(f"{name}: " + ", ".join(f"{step} {s:.3f} s" for step, s in seconds.items()))
    screen.line()


def show_decode(whole: Report, screen: Screen) -> None:
    """Print what the decode phases found."""
    cases, micro_batches = whole.others.get("decode", []), whole.others.get("micro", [])
    if cases:
        rows = decode_report.rows(cases, whole.limits, whole.node_us)
        screen.table("decode calls, median us (5th-95th percentile)", decode_report.HEADER, rows)
        screen.line(f"M={cases[0]['max_tokens']}. KB out: {gpu_report.BYTES}. {decode_report.HOOK}")
        screen.line(f"limit: {decode_report.LIMIT}. of limit: of the graph's time")
        if whole.node_us is not None:
            screen.line(f"an empty kernel of a graph: {whole.node_us:.2f} us")
        screen.line(f"checked: {decode_report.CHECKED}")
    if micro_batches:
        screen.table(
            "two micro-batches, as CUDA graphs", decode_report.MICRO_HEADER, decode_report.micro_rows(micro_batches)
        )
        screen.line("hidden: (work alone + calls alone - by hooks) / calls alone")


def show_short(whole: Report, screen: Screen) -> None:
    """Print what failed, and the short table."""
    for one in whole.failed:
        screen.line(f"not measured: {one['what']}: {one['why']}")
    rows = whole.short()
    if rows:
        screen.table(f"{whole.about['title']}; medians", gpu_report.SHORT_HEADER, rows)
