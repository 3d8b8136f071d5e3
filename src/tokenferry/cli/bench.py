"""`tokenferry bench`: dispatch and combine against plain all_to_all_single of the same bytes."""

from __future__ import annotations

import argparse
from typing import Any

from tokenferry.bench.core.session import Settings
from tokenferry.bench.report import about, tables
from tokenferry.bench.report.report import CPU_NOTES, Report
from tokenferry.bench.suites.cpu_calls import RUNS, calls_for, measure_cpu_calls
from tokenferry.cli import bench_cuda
from tokenferry.cli.bench_models import model_sizes
from tokenferry.cli.failure import explain, status
from tokenferry.cli.options import check_experts, fill_sizes, positive, positives, seed_of
from tokenferry.cli.output import add_json, write_json
from tokenferry.cli.screen import Screen
from tokenferry.errors import ConfigError
from tokenferry.testing.world import World, WorldError

DESCRIPTION = """\
Starts R ranks on this host, checks every answer, then times each call of the CPU backend and, in turns with it, plain
gloo all_to_all_single of the same row bytes between the same ranks. No time is printed for a wrong answer.

`tokenferry bench decode` measures decode_dispatch and decode_combine on GPUs: as CUDA graphs and eagerly, with hooks
and without, beside the limit, and two-batch overlap by hooks.

`tokenferry bench eager` measures what a program feels: the wall clock of eager calls, natively, through DeepEP's API
and with all_to_all_single and what it needs around it, and the host's time of each; also with --device cpu.

`tokenferry bench megatron` measures a training step of two MoE layers of Megatron-Core, unmodified: its flex dispatcher
over our `deep_ep` against its own all-to-all, after their losses and gradients have been compared.

`tokenferry bench transformers` measures a Qwen3-MoE model of transformers with random weights, unmodified: tokens a
second in training and in generation, with `ep_implementation="tokenferry"` and with its own all-to-all, in turns, after
logits, losses, gradients and generated tokens have been compared; also with --device cpu.

`tokenferry bench nodes` measures dispatch and combine, and pairs of decode calls, in a group of several nodes, which
ranks of this host play, beside each of their two legs alone, and counts the rows that cross; on CPUs, or with --device
cuda.

With --device cuda: one rank on each GPU, FP8 and BF16, plans kept and not, beside the rates of the links in the same
run and NCCL's all_to_all_single with the index work around it. Results are kept as they come; a case that fails is left
out.

Each time is the slowest rank's, the median over the iterations with 5th and 95th percentile:
  isolated       the ranks are synchronised before each call
  back to back   one call after the other
"""
JOB_TIMEOUT_S = 1800.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes; the defaults are the case that the project's CPU target names."""
    parser.add_argument(
        "what",
        nargs="?",
        choices=tuple(bench_cuda.WHAT),
        help="decode: the decode calls and two-batch overlap, on GPUs; eager: wall clock and host time of eager calls; "
        "megatron: a training step of Megatron-Core; transformers: a model of transformers; nodes: calls across nodes "
        "(default: all but the last four)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu; with one of these parts: cuda")
    parser.add_argument("--ranks", type=positive, help="R (default: 4; on GPUs one on each, at most 8)")
    parser.add_argument(
        "--tokens", type=positives, help="T, on every rank; on GPUs several, as 128,4096 (default: 128; on GPUs many)"
    )
    parser.add_argument(
        "--hidden", type=positive, help="H, bfloat16 (default: 7168; megatron: 2048; transformers: 2048, on CPUs 256)"
    )
    parser.add_argument("--top-k", type=positive, help="K (default: 8; transformers on CPUs: 4)")
    parser.add_argument("--experts", type=positive, help="E (default: 256; megatron: 32; transformers: 64, on CPUs 16)")
    parser.add_argument("--iterations", type=positive, default=30, help="iterations that count (default: 30)")
    parser.add_argument(
        "--transport", choices=("both", "shared_memory", "process_group"), default="both", help="default: both"
    )
    parser.add_argument(
        "--threads", type=positive, help="threads of each rank (default: the cores shared out, at least 1)"
    )
    parser.add_argument("--seed", type=int, help="of the inputs (default: another one each time)")
    add_json(parser)
    bench_cuda.add_arguments(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Check, measure, print; 1 if an answer was wrong."""
    args.device = args.device or ("cpu" if args.what in (None, "nodes") else "cuda")
    if args.device == "cuda" or args.what in bench_cuda.ON_CPU:
        return bench_cuda.run(args, screen)
    settings = _settings(args)
    threads = args.threads or about.threads_for(settings.ranks)
    report = Report(settings, {**about.about(args.command_line), "threads_per_rank": threads}, CPU_NOTES)
    machine = report.about["machine"]
    screen.line(f"{machine['processor']}, {machine['cores']} cores (load {machine['load']}), {machine['system']}")
    for line in about.lines(args.command_line):
        screen.line(line)
    screen.line(
        f"{settings.sizes(settings.tokens[0])} bfloat16, {settings.iterations} iterations, {threads} thread(s) a rank"
    )
    transports = ("shared_memory", "process_group") if args.transport == "both" else (args.transport,)
    try:
        with World(settings.ranks, timeout_s=JOB_TIMEOUT_S, threads=threads) as world:
            for transport in transports:
                _measure(world, report, transport, screen)
    except WorldError as error:
        screen.line(f"{explain(error)}\nno time is printed", style="bold red")
        return status(error)
    screen.line(f"MB/rank: {CPU_NOTES['bytes']}. GB/s: these over the median.")
    if args.json is not None:
        write_json(report.as_json(), args.json, screen)
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    fill_sizes(args)
    ranks, tokens = args.ranks or 4, args.tokens or (128,)
    if args.what:
        raise ConfigError(f"{args.what} needs --device cuda")
    for option in ("quick", "sms", "routing", "only", "plot", "default_device"):
        if getattr(args, option):
            raise ConfigError(f"--{option.replace('_', '-')} needs --device cuda")
    if len(tokens) > 1:
        raise ConfigError(f"--tokens {','.join(map(str, tokens))}: several need --device cuda; choose one")
    check_experts(args, ranks)
    model_sizes(args, ranks)
    if args.hidden % 8:
        raise ConfigError(f"--hidden {args.hidden}: a row has to be a multiple of 16 bytes; use a multiple of 8")
    return Settings(
        ranks=ranks,
        tokens=tokens,
        hidden=args.hidden,
        top_k=args.top_k,
        experts=args.experts,
        iterations=args.iterations,
        warmup=max(1, min(5, args.iterations)),
        seed=seed_of(args),
        backend="cpu",
        runs=RUNS,
    )


def _measure(world: World, report: Report, transport: str, screen: Screen) -> None:
    before = len(report.results)
    with screen.progress(f"transport {transport}", 1 + len(calls_for(report.settings))) as advance:

        def take(item: dict[str, Any]) -> None:
            if "now" in item:
                advance(1, item["now"])
            else:
                report.take(item)

        world.run_with_progress(measure_cpu_calls, report.settings, transport, on_item=take)
    screen.line(f"checked: {CPU_NOTES['checked']}")
    rows = tables.baseline_rows(report.results[before:])
    screen.table(f"transport {transport}", tables.BASELINE_HEADER, rows)
    screen.line()
