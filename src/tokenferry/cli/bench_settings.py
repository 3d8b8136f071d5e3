"""The settings that the options of `tokenferry bench` ask for, and their defaults in each of its parts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from tokenferry.bench.core.session import ModelSizes, Settings
from tokenferry.bench.suites import language
from tokenferry.bench.suites.transformers_models import HEAD
from tokenferry.cli.options import check_experts, check_fp8, seed_of
from tokenferry.errors import ConfigError

QUICK_TOKENS = (128, 1024, 4096, 8192)
FULL_TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384)
FULL_SMS = (4, 8, 12, 16, 20, 24, 32, 48)
SWEEP_TOKENS = 4096
QUICK_DECODE_TOKENS = (1, 128)
FULL_DECODE_TOKENS = (1, 8, 32, 64, 128, 256, 512)
MOST_DECODE_TOKENS = 1024
"""Beyond, the worst case at every expert needs more memory than GPUs have."""

CPU_BACKEND_RANKS = 4
CPU_RANKS = 2
NODES_RANKS = 4
"""R of part ``cpu``, of other parts on CPUs, and of ``nodes``."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a part measures where no option says otherwise.

    Attributes:
        tokens: Values of T.
        hidden: H.
        top_k: K.
        experts: E.
        model: Sizes of a whole model; None where none is measured.
    """

    tokens: tuple[int, ...] = FULL_TOKENS
    hidden: int = 7168
    top_k: int = 8
    experts: int = 256
    model: ModelSizes | None = None


DEFAULTS = {
    ("cpu", "cpu"): Defaults((128,)),
    ("gpu", "cuda"): Defaults(),
    ("decode", "cuda"): Defaults(FULL_DECODE_TOKENS),
    ("eager", "cuda"): Defaults(),
    ("eager", "cpu"): Defaults((1, 128)),
    ("megatron", "cuda"): Defaults((4096,), hidden=2048, experts=32),
    ("transformers", "cuda"): Defaults((4096,), 2048, 8, 64, ModelSizes(4, 768, 32, 32)),
    ("transformers", "cpu"): Defaults((128,), 256, 4, 16, ModelSizes(2, 128, 4, 8)),
    ("language", "cuda"): Defaults((4096,), 2048, 8, 64, ModelSizes(4, 768, 0, 0)),
    ("language", "cpu"): Defaults((128,), 256, 4, 16, ModelSizes(2, 128, 0, 0)),
    ("nodes", "cuda"): Defaults((128, 1024)),
    ("nodes", "cpu"): Defaults((128, 1024)),
}
"""By part and device."""

NOT_GIVEN = {
    **dict.fromkeys(("tokens", "sms", "routing", "only", "plot", "ranks_per_node", "between")),
    **dict.fromkeys(("layers", "intermediate", "batch", "new_tokens")),
    **dict.fromkeys(("quick", "default_device"), False),
    "two_batch_tokens": 128,
}
"""Values of the options that a part does not have."""


def nodes_ranks(num_gpus: int) -> int:
    """Return the default of R for calls across nodes. Few GPUs are shared by two nodes. Pure."""
    return NODES_RANKS if num_gpus == 0 else num_gpus if num_gpus >= NODES_RANKS else 2 * num_gpus


def fill_sizes(args: argparse.Namespace, ranks: int) -> Defaults:
    """Fill in the sizes that were not given, R with ``ranks``; return the defaults of this part and device.

    Raises:
        ConfigError: sizes do not fit one another.
    """
    default = DEFAULTS[args.part, args.device]
    args.ranks = args.ranks or ranks
    args.tokens = args.tokens or (QUICK_TOKENS if args.quick else default.tokens)
    args.hidden, args.top_k = args.hidden or default.hidden, args.top_k or default.top_k
    args.experts = args.experts or default.experts
    check_experts(args, args.ranks)
    return default


def common_settings(args: argparse.Namespace) -> Settings:
    """Return the settings of all parts, once sizes are filled in."""
    return Settings(
        ranks=args.ranks,
        tokens=args.tokens,
        hidden=args.hidden,
        top_k=args.top_k,
        experts=args.experts,
        iterations=args.iterations,
        warmup=max(1, min(5, args.iterations)),
        seed=seed_of(args),
        backend=args.device,
    )


def make_settings(args: argparse.Namespace, available: int) -> Settings:
    """Return the settings that the options ask for, on ``available`` GPUs.

    Raises:
        ConfigError: sizes do not fit one another.
    """
    named = args.tokens or ()
    model = fill_sizes(args, max(1, min(available, 8))).model
    if args.part != "language":  # which has no FP8 rows
        check_fp8(args)
    if args.part == "nodes":
        _fill_nodes(args, available)
    decode_tokens = tuple(count for count in named if count <= MOST_DECODE_TOKENS)
    return replace(
        common_settings(args),
        sms=FULL_SMS if args.sms is None else args.sms,
        sweep_tokens=SWEEP_TOKENS if SWEEP_TOKENS in args.tokens else max(args.tokens),
        routings=args.routing or (("uniform",) if args.quick else ("uniform", "skewed")),
        decode_tokens=decode_tokens or (QUICK_DECODE_TOKENS if args.quick else FULL_DECODE_TOKENS),
        two_batch_tokens=args.two_batch_tokens,
        default_device=args.default_device,
        ranks_per_node=args.ranks_per_node,
        between=args.between or "sockets",
        model=None if model is None else _model_sizes(args, model),
    )


def _fill_nodes(args: argparse.Namespace, available: int) -> None:
    ranks = args.ranks
    args.ranks_per_node = args.ranks_per_node or max(1, ranks // 2)
    if ranks % args.ranks_per_node or ranks == args.ranks_per_node:
        raise ConfigError(
            f"--ranks {ranks} --ranks-per-node {args.ranks_per_node}: expected at least two nodes, of equally many "
            "ranks"
        )
    if args.between and args.device == "cpu":
        raise ConfigError("--between is for GPUs: `tokenferry bench nodes --device cuda --between nvlink`")
    if args.between == "nvlink" and ranks > available:
        raise ConfigError(f"--between nvlink --ranks {ranks}: expected a GPU for each rank, and there are {available}")


def _model_sizes(args: argparse.Namespace, default: ModelSizes) -> ModelSizes:
    if args.ranks < 2:
        raise ConfigError(f"{args.part}: one rank shares its experts with none; use --ranks 2 or more")
    if args.part == "language" and args.hidden % language.HEAD:
        raise ConfigError(f"--hidden {args.hidden}: expected a multiple of {language.HEAD}, the columns of a head")
    if args.part == "transformers":
        _check_transformers(args)
    return ModelSizes(
        args.layers or default.layers,
        args.intermediate or default.intermediate,
        args.batch or default.batch,
        args.new_tokens or default.new_tokens,
    )


def _check_transformers(args: argparse.Namespace) -> None:
    if args.hidden < 2 * args.experts:
        raise ConfigError(
            f"--hidden {args.hidden} --experts {args.experts}: the first E columns name the experts of a token; use at "
            "least twice as many columns"
        )
    ranks = args.ranks
    if args.hidden % (HEAD * ranks):
        raise ConfigError(
            f"--hidden {args.hidden} --ranks {ranks}: heads of {HEAD} columns are split between the ranks; use a "
            f"multiple of {HEAD * ranks}"
        )
