"""`tokenferry bench`: dispatch and combine against plain all_to_all_single of the same bytes."""

from __future__ import annotations

import argparse
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenferry
from tokenferry.bench.core.inputs import Spec
from tokenferry.bench.core.progress import run_with_feed
from tokenferry.bench.report import cpu as report
from tokenferry.bench.suites.cpu_calls import measure, num_steps
from tokenferry.cli import bench_cuda
from tokenferry.cli.failure import explain
from tokenferry.cli.options import check_experts, positive, positives
from tokenferry.cli.screen import Screen
from tokenferry.errors import ConfigError
from tokenferry.testing.world import World, WorldError

HELP = "measure dispatch and combine on this machine, against plain all_to_all_single"
DESCRIPTION = """\
Starts R ranks on this host, checks every answer, then times each call of the CPU backend and, in turns with it, plain
gloo all_to_all_single of the same row bytes between the same ranks. No time is printed for a wrong answer.

`tokenferry bench decode` measures decode_dispatch and decode_combine on GPUs: as CUDA graphs and eagerly, with hooks
and without, beside the limit, and two micro-batches that hooks overlap.

With --device cuda: one rank on each GPU, FP8 and BF16, plans kept and not, beside what the links do in the same run and
NCCL's all_to_all_single with the index work around it. Results are kept as they come; a case that fails is left out.

Each time is the slowest rank's, the median over the iterations with 5th and 95th percentile:
  drained   the ranks are synchronised before each call
  chained   calls back to back
"""
JOB_TIMEOUT_S = 1800.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes; the defaults are the case that the project's CPU target names."""
    parser.add_argument(
        "what",
        nargs="?",
        choices=("decode",),
        help="decode: the decode calls and micro-batches, on GPUs (default: all)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu; with decode: cuda")
    parser.add_argument("--ranks", type=positive, help="R (default: 4; on GPUs one on each, at most 8)")
    parser.add_argument(
        "--tokens", type=positives, help="T, on every rank; on GPUs several, as 128,4096 (default: 128; on GPUs many)"
    )
    parser.add_argument("--hidden", type=positive, default=7168, help="H, bfloat16 (default: 7168)")
    parser.add_argument("--top-k", type=positive, default=8, help="K (default: 8)")
    parser.add_argument("--experts", type=positive, default=256, help="E (default: 256)")
    parser.add_argument("--iters", type=positive, default=30, help="iterations that count (default: 30)")
    parser.add_argument(
        "--transport", choices=("both", "shared_memory", "process_group"), default="both", help="default: both"
    )
    parser.add_argument(
        "--threads", type=positive, help="threads of each rank (default: the cores shared out, at least 1)"
    )
    parser.add_argument("--seed", type=int, help="of the inputs (default: another one each time)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to FILE as well")
    bench_cuda.add_arguments(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Check, measure, print; 1 if an answer was wrong."""
    args.device = args.device or ("cuda" if args.what else "cpu")
    if args.device == "cuda":
        return bench_cuda.run(args, screen)
    spec = _spec(args)
    threads = args.threads or report.threads_for(spec.ranks)
    machine = report.machine()
    screen.line(f"{machine['processor']}, {machine['cores']} cores (load {machine['load']}), {machine['system']}")
    screen.line(
        f"tokenferry {tokenferry.__version__}, commit {report.commit() or 'unknown'}, "
        f"Python {machine['python']}, torch {machine['torch']}"
    )
    screen.line(f"command: {args.command_line}")
    screen.line(
        f"R={spec.ranks} T={spec.tokens} H={spec.hidden} K={spec.top_k} E={spec.experts} bfloat16, seed {spec.seed}, "
        f"{spec.iters} iterations, {threads} thread(s) a rank"
    )
    transports = ("shared_memory", "process_group") if args.transport == "both" else (args.transport,)
    results: list[report.Line] = []
    try:
        with World(spec.ranks, timeout_s=JOB_TIMEOUT_S, threads=threads) as world:
            for transport in transports:
                results += _measure(world, spec, transport, screen)
    except WorldError as error:
        screen.line(f"{explain(error)}\nno time is printed", style="bold red")
        return 1
    screen.line(f"MB/rank: {report.BYTES}. GB/s: these over the median.")
    if args.json is not None:
        text = json.dumps(report.as_json(spec, threads, args.command_line, results), indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
        screen.line(f"written: {args.json}")
    return 0


def _spec(args: argparse.Namespace) -> Spec:
    ranks, tokens = args.ranks or 4, args.tokens or (128,)
    if args.what:
        raise ConfigError(f"{args.what} needs --device cuda")
    for option in ("quick", "sms", "routing", "only", "plot"):
        if getattr(args, option):
            raise ConfigError(f"--{option} needs --device cuda")
    if len(tokens) > 1:
        raise ConfigError(f"--tokens {','.join(map(str, tokens))}: several need --device cuda; choose one")
    check_experts(args, ranks)
    if args.hidden % 8:
        raise ConfigError(f"--hidden {args.hidden}: a row has to be a multiple of 16 bytes; use a multiple of 8")
    seed = secrets.randbits(31) if args.seed is None else args.seed % 2**31
    warmup = max(1, min(5, args.iters))
    return Spec(ranks, tokens[0], args.hidden, args.top_k, args.experts, args.iters, warmup, seed)


def _measure(world: World, spec: Spec, transport: str, screen: Screen) -> list[report.Line]:
    with screen.progress(f"transport {transport}", num_steps(spec)) as advance:
        answers = run_with_feed(world, measure, spec, transport, on_item=_show(advance))
    lines = report.lines(transport, [samples for samples, _ in answers])
    screen.line(f"checked: {report.CHECKED}")
    screen.table(f"transport {transport}", report.HEADER, [report.cells(line) for line in lines])
    screen.line()
    return lines


def _show(advance: Callable[[int, str], None]) -> Callable[[dict[str, Any]], None]:
    return lambda item: advance(1, item["now"])
