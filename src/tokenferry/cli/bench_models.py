"""The options of `tokenferry bench transformers`, which only a whole model has."""

from __future__ import annotations

import argparse

from tokenferry.bench.core.session import ModelSizes
from tokenferry.bench.suites.transformers_models import HEAD
from tokenferry.cli.options import positive
from tokenferry.errors import ConfigError

DEFAULT = ModelSizes(layers=4, intermediate=768, batch=32, new_tokens=32)
DEFAULT_ON_CPUS = ModelSizes(layers=2, intermediate=128, batch=4, new_tokens=8)
OPTIONS = {
    "layers": "layers of the model (default: 4; on CPUs 2)",
    "intermediate": "inner size of an expert (default: 768; on CPUs 128)",
    "batch": "sequences that each rank generates at once (default: 32; on CPUs 4)",
    "new_tokens": "tokens that are generated for each of them (default: 32; on CPUs 8)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    group = parser.add_argument_group("with transformers")
    for name, text in OPTIONS.items():
        group.add_argument(_option(name), type=positive, help=text)


def model_sizes(args: argparse.Namespace, ranks: int) -> ModelSizes | None:
    """Return the sizes of the model, or None if none is measured.

    Raises:
        ConfigError: the options do not fit the others, or need a model.
    """
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if args.what != "transformers":
        if given:
            raise ConfigError(f"{_option(next(iter(given)))} is for `tokenferry bench transformers`")
        return None
    if ranks < 2:
        raise ConfigError("transformers: one rank shares its experts with none; use --ranks 2 or more")
    if args.hidden < 2 * args.experts:
        raise ConfigError(
            f"--hidden {args.hidden} --experts {args.experts}: the first E columns name the experts of a token; use at "
            "least twice as many columns"
        )
    if args.hidden % (HEAD * ranks):
        raise ConfigError(
            f"--hidden {args.hidden} --ranks {ranks}: heads of {HEAD} columns are split between the ranks; use a "
            f"multiple of {HEAD * ranks}"
        )
    default = DEFAULT_ON_CPUS if args.device == "cpu" else DEFAULT
    return ModelSizes(**{name: given.get(name, getattr(default, name)) for name in OPTIONS})


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
