"""`tokenferry bench`: its parts, each with its own help and options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tokenferry.bench.core.inputs import ROUTINGS
from tokenferry.cli import bench_cpu, bench_phases
from tokenferry.cli.bench_settings import DEFAULTS, NOT_GIVEN, Defaults
from tokenferry.cli.options import SIZES, integer, one_of, positive, positives
from tokenferry.cli.output import add_json, output_folder
from tokenferry.cli.parser import EPILOG, HelpFormatter
from tokenferry.cli.screen import Screen

DESCRIPTION = """\
Starts R ranks on this host, makes each call with fresh random inputs, checks every answer, and only then times it; a
wrong answer gets no time. `tokenferry bench PART --help` shows the options of a part.

Each time is the slowest rank's, the median over the iterations with 5th and 95th percentile:
  isolated       the ranks are synchronised before each call
  back to back   one call after the other
"""
CPU = """\
Times each call of the CPU backend and, in turns with it, plain gloo all_to_all_single of the same row bytes between the
same ranks. If an answer is wrong, no time is printed.
"""
GPU = """\
One rank on each GPU, FP8 and BF16, plans kept and not, beside the rates of the links in the same run and NCCL's
all_to_all_single with the index work around it. Results are kept as they come; a case that fails is left out.
"""
DECODE = """\
decode_dispatch and decode_combine on GPUs: as CUDA graphs and eagerly, with hooks and without, beside the limit, and
two-batch overlap by hooks.
"""
EAGER = """\
What a program feels: the wall clock of eager calls, natively, through DeepEP's API and with all_to_all_single and what
it needs around it, and the host's time of each.
"""
MEGATRON = """\
A training step of two MoE layers of Megatron-Core, unmodified, on GPUs: its flex dispatchers over tokenferry's
`deep_ep` against its own all-to-all and all-gather, after their losses and gradients have been compared.
"""
TRANSFORMERS = """\
A Qwen3-MoE model of transformers with random weights, unmodified: tokens a second in training and in generation, with
`ep_implementation="tokenferry"` and with its own all-to-all, in turns, after logits, losses, gradients and generated
tokens have been compared.
"""
LANGUAGE = """\
A training step of a byte-level language model with FSDP2 and AdamW: experts in `MoELayer`, and the same experts reached
through torch's all_to_all_single, in turns, after losses and gradients have been compared.
"""
NODES = """\
dispatch, redispatch and combine, eagerly and in CUDA graphs, and pairs of decode calls, in a group of several nodes,
which are all on this host. Beside them each of their two legs alone: the rows between nodes, and those inside of nodes.
Counts the bytes that cross.
"""
MODEL_OPTIONS = {
    "layers": "layers of the model",
    "intermediate": "inner size of an expert",
    "batch": "sequences that each rank generates at once",
    "new_tokens": "tokens that are generated for each of them",
}
ITERATIONS = 30


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the benchmark.

    Attributes:
        text: Its line in the list of parts.
        description: What it measures.
        devices: Where it runs; the first is the default.
        ranks: The default of R, in words.
        options: Declares the options that other parts do not have.
        run: Measures and prints; returns the exit status.
    """

    text: str
    description: str
    devices: tuple[str, ...]
    ranks: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Screen], int] = bench_phases.run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the parts, each with its sizes and options."""
    parts = parser.add_subparsers(dest="part", metavar="PART")
    for name, part in PARTS.items():
        one = parts.add_parser(
            name, help=part.text, description=part.description, epilog=EPILOG, formatter_class=HelpFormatter
        )
        one.set_defaults(**NOT_GIVEN, device=part.devices[0], parser=one)
        _add_sizes(one, name, part)
        part.options(one)
        add_json(one)


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Run the part that was chosen."""
    if args.part is None:
        args.parser.error(f"name a part, one of {', '.join(PARTS)}; `tokenferry bench --help` says what they measure")
    return PARTS[args.part].run(args, screen)


def _add_sizes(parser: argparse.ArgumentParser, name: str, part: Part) -> None:
    if len(part.devices) > 1:
        parser.add_argument("--device", choices=part.devices, help=f"default: {part.devices[0]}")
    parser.add_argument("--ranks", type=positive, help=f"{SIZES['ranks']} (default: {part.ranks})")
    several = "" if name == "cpu" else "; several as 1,128"
    tokens = f"{SIZES['tokens']}{several} ({_default(name, lambda one: one.tokens)})"
    parser.add_argument("--tokens", type=positives, help=tokens)
    for size in ("hidden", "top_k", "experts"):
        default = _default(name, lambda one, size=size: getattr(one, size))  # type: ignore[misc]
        parser.add_argument(f"--{size.replace('_', '-')}", type=positive, help=f"{SIZES[size]} ({default})")
    parser.add_argument(
        "--iterations", type=positive, default=ITERATIONS, help=f"iterations that count (default: {ITERATIONS})"
    )
    parser.add_argument("--seed", type=integer, help="seed of the inputs (default: another one each time)")


def _default(part: str, value: Callable[[Defaults], object]) -> str:
    """Return the default of a size in words: that of GPUs, and that of CPUs where it is another."""
    words = {device: _words(value(one)) for (name, device), one in DEFAULTS.items() if name == part}
    text = f"default: {words.get('cuda', words.get('cpu'))}"
    return text if len(set(words.values())) == 1 else f"{text}; on CPUs {words['cpu']}"


def _words(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _add_cpu(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--transport", choices=("both", "shared_memory", "process_group"), default="both", help="default: both"
    )
    parser.add_argument(
        "--threads", type=positive, help="threads of each rank (default: the cores shared out, at least 1)"
    )


def _add_gpu(parser: argparse.ArgumentParser) -> None:
    phases = "; ".join(f"{name}: {bench_phases.PHASES[name].what}" for name in bench_phases.FULL_PHASES)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and phases: about a minute")
    parser.add_argument("--sms", type=positives, help="values of num_sms to sweep over, as 8,16,24")
    parser.add_argument("--routing", type=one_of(*ROUTINGS), help=f"with commas between them: {', '.join(ROUTINGS)}")
    parser.add_argument(
        "--only",
        type=one_of(*bench_phases.FULL_PHASES),
        metavar="PHASES",
        help=f"with commas between them: {phases}",
    )
    _add_two_batch(parser)
    _add_plot(parser)


def _add_decode(parser: argparse.ArgumentParser) -> None:
    _add_two_batch(parser)
    _add_plot(parser)


def _add_eager(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--default-device",
        action="store_true",
        help="make the calls with the device as torch's default, as torch.set_default_device does",
    )
    _add_plot(parser)


def _add_model(parser: argparse.ArgumentParser, part: str, names: Sequence[str]) -> None:
    for name in names:
        default = _default(part, lambda one, name=name: getattr(one.model, name))  # type: ignore[misc]
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, help=f"{MODEL_OPTIONS[name]} ({default})")


def _add_nodes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks-per-node", type=positive, help="consecutive ranks that form a node (default: half of R)"
    )
    parser.add_argument(
        "--between",
        choices=("sockets", "nvlink"),
        help="what NCCL connects nodes by on GPUs: TCP on the loopback (default), or NVLink, for a rank on each GPU",
    )


def _add_two_batch(parser: argparse.ArgumentParser) -> None:
    default = NOT_GIVEN["two_batch_tokens"]
    parser.add_argument(
        "--two-batch-tokens",
        type=positive,
        help=f"T of both micro-batches of two-batch overlap together (default: {default})",
    )


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plot", metavar="FOLDER", type=output_folder, help="write pictures into FOLDER; needs matplotlib"
    )


ONE_EACH = "one on each GPU, at most 8"
PARTS = {
    "cpu": Part("calls of the CPU backend, beside plain gloo", CPU, ("cpu",), "4", _add_cpu, bench_cpu.run),
    "gpu": Part("all calls on GPUs, beside the links' rates and NCCL", GPU, ("cuda",), ONE_EACH, _add_gpu),
    "decode": Part("decode calls on GPUs, and two-batch overlap", DECODE, ("cuda",), ONE_EACH, _add_decode),
    "eager": Part(
        "wall clock and host time of eager calls", EAGER, ("cuda", "cpu"), f"{ONE_EACH}; on CPUs 2", _add_eager
    ),
    "megatron": Part("a training step of Megatron-Core, on GPUs", MEGATRON, ("cuda",), ONE_EACH, _add_plot),
    "transformers": Part(
        "a model of transformers, training and generating",
        TRANSFORMERS,
        ("cuda", "cpu"),
        f"{ONE_EACH}; on CPUs 2",
        partial(_add_model, part="transformers", names=tuple(MODEL_OPTIONS)),
    ),
    "language": Part(
        "a language model, trained by MoELayer and by all-to-all",
        LANGUAGE,
        ("cuda", "cpu"),
        f"{ONE_EACH}; on CPUs 2",
        partial(_add_model, part="language", names=("layers", "intermediate")),
    ),
    "nodes": Part(
        "calls across nodes, beside each of their two legs alone",
        NODES,
        ("cpu", "cuda"),
        "4; on GPUs one on each, and two where there are fewer than 4",
        _add_nodes,
    ),
}
