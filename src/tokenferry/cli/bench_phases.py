"""The phases of `tokenferry bench`, each in ranks that may fail without ending the others."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenferry.bench.baselines import nccl, vdev
from tokenferry.bench.core.default_group import in_default_group
from tokenferry.bench.core.gpus import find_gpus, need_gpus
from tokenferry.bench.core.session import Settings, in_session
from tokenferry.bench.report import about, tables
from tokenferry.bench.report.plots import need_matplotlib
from tokenferry.bench.report.report import GPU_NOTES, Report
from tokenferry.bench.suites import (
    calls,
    decode,
    eager,
    first_call,
    host_time,
    language,
    limits,
    megatron,
    nodes,
    nodes_decode,
    overlap,
    transformers,
    two_batch_overlap,
)
from tokenferry.cli import limits as cli_limits
from tokenferry.cli.bench_settings import CPU_RANKS, DEFAULTS, make_settings, nodes_ranks
from tokenferry.cli.failure import explain
from tokenferry.cli.output import STDOUT, write_json
from tokenferry.cli.parser import NOT_POSSIBLE
from tokenferry.cli.screen import Screen
from tokenferry.errors import BackendUnavailable, ConfigError
from tokenferry.testing.world import World, WorldError

QUICK_LIMITS = limits.LimitSettings(num_sms=(8, 12, 16, 24, 64, 132), runs=3, iterations=500)


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase.

    Attributes:
        measure: The suite, a function of a session. Those of ``limits`` and ``start`` have no session.
        timeout_s: Seconds that it may take.
        what: What it measures.
        part: The part of `tokenferry bench` that has it.
        job: Runs on every rank, and calls the suite.
    """

    measure: Callable[..., Any]
    timeout_s: float
    what: str
    part: str = "gpu"
    job: Callable[..., Any] = in_session


PHASES = {
    "limits": Phase(limits.measure_limits, 60.0, "the rates of the links"),
    "calls": Phase(calls.measure_calls, 150.0, "dispatch and combine for every T, and other routings"),
    "nccl": Phase(nccl.measure_nccl, 90.0, nccl.DESCRIPTION),
    "host": Phase(host_time.measure_host, 60.0, "host time of eager calls; a pair in a CUDA graph"),
    "decode": Phase(
        decode.measure_decode,
        180.0,
        "decode calls: graphs, eager, isolated, back to back, hooks; adds limits",
    ),
    "two_batch": Phase(two_batch_overlap.measure_two_batch, 60.0, "two micro-batches of decoding, overlapped by hooks"),
    "sms": Phase(calls.measure_sms, 90.0, "dispatch and combine for every number of SMs"),
    "overlap": Phase(overlap.measure_overlap, 180.0, "communication beside expert GEMMs"),
    "memory": Phase(host_time.measure_memory, 60.0, "device memory of a group"),
    "start": Phase(first_call.run_both, 240.0, "the first call of a process"),
    "eager": Phase(
        eager.measure_eager,
        540.0,
        "eager calls on the wall clock: the native API, Buffer, all_to_all_single with the work around it; host time",
        "eager",
    ),
    "megatron": Phase(
        megatron.measure_megatron,
        300.0,
        "a training step of two MoE layers of Megatron-Core: flex over our deep_ep, and its own dispatchers",
        "megatron",
    ),
    "transformers": Phase(
        transformers.measure_transformers,
        540.0,
        "a model of transformers, trained and generating: experts through tokenferry, and in its own ways",
        "transformers",
        in_default_group,
    ),
    "language": Phase(
        language.measure_language,
        300.0,
        "a language model, trained: MoELayer, and experts through all_to_all_single",
        "language",
        in_default_group,
    ),
    "nodes": Phase(
        nodes.measure_nodes,
        540.0,
        "calls across nodes, beside each of their legs alone, eagerly and in graphs",
        "nodes",
    ),
    "nodes_decode": Phase(
        nodes_decode.measure_node_pairs, 300.0, "decode calls across nodes, beside their legs alone", "nodes"
    ),
    "vdev": Phase(vdev.measure_vdev, 60.0, "torch's symm_mem.all_to_all_vdev_2d, at 16 experts a rank"),
}

BASELINES = ("nccl", "all_to_all_single", "vdev_2d", "phase nccl", "phase vdev")
"""Parts that may fail without this command failing: software that may not be installed."""

QUICK_PHASES = ("limits", "calls", "nccl", "host", "decode", "memory", "start")
DECODE_PHASES = ("limits", "decode", "two_batch")
FULL_PHASES = tuple(name for name, phase in PHASES.items() if phase.part == "gpu")

DRAWN = ("calls", "sms", "decode", "eager", "megatron")
"""The phases of which there are pictures."""


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Measure, print; 1 if a case of tokenferry failed, 3 if what was asked for is not installed."""
    phases = choose_phases(args)
    on_gpus = args.device == "cuda"
    available = _count_gpus(args.part) if on_gpus else CPU_RANKS
    needed = {"megatron": megatron, "transformers": transformers}.get(args.part)
    if needed is not None and needed.version() is None:
        screen.line(needed.NOT_INSTALLED)
        return NOT_POSSIBLE
    if args.part == "nodes":
        available = available if args.between == "nvlink" else nodes_ranks(available if on_gpus else 0)
    if args.plot is not None:
        need_matplotlib()
    gpus = find_gpus()
    settings = make_settings(args, available)
    machine = f"{gpus.count} x {gpus.name}" if on_gpus else str(about.machine()["processor"])
    title = f"{machine}, R={settings.ranks} H={settings.hidden} K={settings.top_k} E={settings.experts}"
    about_run = {"title": title, **about.about(args.command_line), "gpus": dataclasses.asdict(gpus)}
    report = Report(settings, about_run, GPU_NOTES, None if args.json == STDOUT else args.json)
    report.write()
    screen.line(gpus.line() if on_gpus else machine)
    for line in about.lines(args.command_line):
        screen.line(line, whole=line.startswith("command: "))
    screen.line(f"{title}, seed {settings.seed}, {settings.iterations} iterations")
    quick = args.quick or args.part != "gpu" or bool(args.only and "limits" not in args.only)
    worlds = Worlds(settings, screen, report, QUICK_LIMITS if quick else limits.LimitSettings())
    try:
        for name in phases:
            worlds.phase(name)
    finally:
        worlds.close()
    report.about["gpus_after"] = [dict(one) for one in find_gpus().smi]
    screen.line()
    _show(report.show(), screen)
    screen.line()
    if args.plot is not None:
        for file in report.draw(args.plot):
            screen.line(f"written: {file}")
    if args.json == STDOUT:
        write_json(report.as_json(), STDOUT, screen)
    elif args.json is not None:
        report.write()
        screen.line(f"written: {args.json}")
    _show(tables.show_short(report), screen)
    return 1 if any(not one["what"].startswith(BASELINES) for one in report.failed) else 0


def _count_gpus(part: str) -> int:
    """Return how many GPUs torch sees.

    Raises:
        BackendUnavailable: none; names the part, and what else there is.
    """
    try:
        return need_gpus()
    except BackendUnavailable as error:
        on_cpus = [name for name, device in DEFAULTS if device == "cpu"]
        instead = "--device cpu" if part in on_cpus else f"the parts {', '.join(on_cpus)}"
        raise BackendUnavailable(f"part {part}: {error}; without GPUs: {instead}") from None


def choose_phases(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the phases to measure, in order.

    Raises:
        ConfigError: there is no picture of what was chosen.
    """
    own = tuple(name for name, phase in PHASES.items() if phase.part == args.part)
    of_part = {"decode": DECODE_PHASES, "gpu": QUICK_PHASES if args.quick else FULL_PHASES}
    chosen: tuple[str, ...] = args.only or of_part.get(args.part, own)
    if args.plot is not None and not set(chosen) & set(DRAWN):
        raise ConfigError(f"--plot: there are pictures of {', '.join(DRAWN)} only; leave it out")
    return chosen if "limits" in chosen or "decode" not in chosen else ("limits", *chosen)


def _show(parts: tables.Shown, screen: Screen) -> None:
    for part in parts:
        if isinstance(part, tables.Table):
            screen.table(part.title, part.header, part.rows)
        else:
            screen.note(part)


class Worlds:
    """Ranks for one phase after another: new ones when a phase has lost them."""

    def __init__(
        self, settings: Settings, screen: Screen, report: Report, limit_settings: limits.LimitSettings
    ) -> None:
        self._settings, self._screen, self._report = settings, screen, report
        self._limit_settings = dataclasses.replace(limit_settings, seed=settings.seed)
        self._world: World | None = None

    def phase(self, name: str) -> None:
        """Run one phase; a failure is shown and recorded."""
        phase = PHASES[name]
        self._screen.line(f"-- {name}: {phase.what}")
        start = time.monotonic()
        try:
            if name == "start":
                self._report.take({"first call": first_call.run_both(self._settings.backend)})
            elif name == "limits":
                world = self._alive(phase.timeout_s)
                found = world.run_with_progress(phase.measure, self._limit_settings, on_item=lambda item: None)[0]
                self._report.limits = found
                cli_limits.show(found, self._screen)
                self._report.write()
            else:
                world = self._alive(phase.timeout_s)
                world.run_with_progress(phase.job, self._settings, phase.measure, on_item=self._show)
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
            self._world = World(
                self._settings.ranks,
                devices=self._settings.backend,
                timeout_s=timeout_s,
                ranks_per_node=self._settings.ranks_per_node if self._settings.between == "sockets" else None,
            )
        self._world.timeout_s = timeout_s
        return self._world

    def _show(self, item: dict[str, Any]) -> None:
        line = self._report.take(item)
        if line:
            self._screen.line(line)

    def _lost(self, name: str, why: str) -> None:
        self._report.fail(f"phase {name}", why)
        self._screen.line(f"FAILED phase {name}: {why}", style="bold red")
