"""`tokenferry demo`: train a small Mixture-of-Experts model over local ranks, and compare with one process."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from tokenferry.bench.report.about import num_cores, threads_for
from tokenferry.cli.failure import explain, status
from tokenferry.cli.options import positive, seed
from tokenferry.cli.output import output_folder
from tokenferry.cli.screen import Screen
from tokenferry.demo import devices as demo_devices
from tokenferry.demo import plot as demo_plot
from tokenferry.demo.compare import Verdict, compare
from tokenferry.demo.train import History, Options, load_text, train_dense, train_sharded
from tokenferry.errors import ConfigError, several
from tokenferry.testing.world import World, WorldError

DESCRIPTION = """\
Trains a byte-level transformer with two Mixture-of-Experts layers (8 experts, 2 per token) on the source text of
Python's standard library: first over R rank processes with 8/R experts each, which exchange tokens by tokenferry, then
with the same model, seed and batches in one process that holds all experts. Fails if the losses differ by more than
rounding explains. Takes about a minute on two cores. On a host with several GPUs each rank uses its own.
"""
JOB_TIMEOUT_S = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--steps", type=positive, default=300, help="optimizer steps (default: 300)")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: GPUs if there are at least two and each rank gets its own (default: auto)",
    )
    parser.add_argument(
        "--ranks", type=positive, help="number of ranks: 1, 2, 4 or 8 (default: 4; on GPUs their number, at most 8)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float64", "float32"),
        default="float64",
        help="float64: strict comparison of every step; float32: faster, with larger tolerances (default: float64)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of parameters and batches (default: 0)")
    parser.add_argument(
        "--out",
        type=output_folder,
        default="demo-out",
        metavar="FOLDER",
        help="folder for demo.png (default: demo-out)",
    )


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Train twice, compare and plot; return 1 if the runs differ."""
    placement = demo_devices.choose(args.device, args.ranks, demo_devices.gpu_capabilities())
    options = Options(args.steps, placement.ranks, args.seed, getattr(torch, args.dtype), placement.device)
    if options.experts % options.ranks:
        raise ConfigError(f"--ranks {options.ranks} does not divide the {options.experts} experts; use 1, 2, 4 or 8")
    start = time.perf_counter()
    screen.line(placement.text)
    screen.line(
        f"text: {len(load_text())} bytes of Python's standard library; model: {options.layers} blocks, "
        f"H={options.hidden}, {options.experts} experts, top-{options.top_k}; "
        f"batch: {options.batch} x {options.context} bytes; {args.dtype}"
    )
    try:
        sharded = _train_sharded(options, screen)
    except WorldError as error:
        screen.line(explain(error), style="bold red")
        return status(error)
    dense = _train_dense(options, screen)
    verdict = compare(sharded, dense, options.dtype, options.device)
    _print_summary(verdict, sharded, dense, screen)
    path = args.out / "demo.png"
    if demo_plot.write(path, sharded, dense):
        screen.line(f"plot: {path}")
    else:
        screen.line("plot: none, matplotlib is not installed (pip install 'tokenferry[plots]')")
    screen.line(f"took {time.perf_counter() - start:.0f} s")
    return 0 if verdict.same else 1


def _train_sharded(options: Options, screen: Screen) -> History:
    threads = threads_for(options.ranks)
    screen.line(f"{several(options.ranks, 'rank')} on {num_cores()} cores, {threads} thread(s) each, starting ...")
    with (
        World(options.ranks, devices=options.device, timeout_s=JOB_TIMEOUT_S, threads=threads) as world,
        screen.progress("training", options.steps) as advance,
    ):
        show = _printer(options, screen, advance)
        histories = world.run_with_progress(train_sharded, options, on_item=show)
    history: History = histories[0]
    return history


def _printer(options: Options, screen: Screen, advance: Callable[[int, str], None]) -> Callable[[dict[str, Any]], None]:
    """Return a function of a progress item that advances the bar and, ten times in all, prints a line."""
    step = 0

    def show(item: dict[str, Any]) -> None:
        nonlocal step
        step += 1
        advance(1, "")
        if step == 1 or step * 10 // options.steps > (step - 1) * 10 // options.steps:
            screen.line(
                f"step {step:4d}  loss {item['loss']:.4f}  dispatch {item['dispatch_s'] * 1e3:5.1f} ms  "
                f"combine {item['combine_s'] * 1e3:5.1f} ms  step {item['step_s'] * 1e3:6.1f} ms  "
                f"rows per expert {' '.join(f'{n:4d}' for n in item['expert_tokens'])}"
            )

    return show


def _train_dense(options: Options, screen: Screen) -> History:
    screen.line("the same model in one process with all experts ...")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # comparable to a rank
    try:
        with screen.progress("dense", options.steps) as advance:
            return train_dense(options, lambda loss: advance(1, f"loss {loss:.4f}"))
    finally:
        torch.set_num_threads(before)


def _print_summary(verdict: Verdict, sharded: History, dense: History, screen: Screen) -> None:
    total = sum(sharded.step_s)
    screen.line(
        f"loss: {sharded.losses[0]:.4f} -> {sharded.losses[-1]:.4f} over {several(sharded.ranks, 'rank')}, "
        f"{dense.losses[0]:.4f} -> {dense.losses[-1]:.4f} in one process"
    )
    screen.line(
        f"time over ranks: {total:.1f} s, of which dispatch {sum(sharded.dispatch_s):.1f} s, combine "
        f"{sum(sharded.combine_s):.1f} s (rank 0, forward and backward, including the wait for other ranks); "
        f"in one process: {sum(dense.step_s):.1f} s"
    )
    screen.line(
        f"{'SAME' if verdict.same else 'DIFFERENT'}: {verdict.text}", style="green" if verdict.same else "bold red"
    )
