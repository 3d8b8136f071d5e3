"""The entry point of the command line: parse the arguments, run the command and return its exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import tokenferry
from tokenferry.cli import bench, deep_ep_path, demo, diagnose, doctor, explain, limits, trace
from tokenferry.cli.screen import Screen
from tokenferry.errors import ConfigError, TokenferryError

COMMANDS = {
    "demo": demo,
    "doctor": doctor,
    "explain": explain,
    "limits": limits,
    "bench": bench,
    "trace": trace,
    "diagnose": diagnose,
    "deep-ep-path": deep_ep_path,
}

EPILOG = "Exit status: 0 success, 1 a check failed, 2 the command line is wrong, 130 interrupted."


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="tokenferry",
        description="Mixture-of-Experts dispatch and combine: try them, check this machine, run benchmarks.",
        epilog=EPILOG,
        formatter_class=form,
    )
    parser.add_argument("--version", action="version", version=f"tokenferry {tokenferry.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        subparser = commands.add_parser(
            name, help=module.HELP, description=module.DESCRIPTION, epilog=EPILOG, formatter_class=form
        )
        module.add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments without the program's name; None takes those of this process.

    Returns:
        The exit status: 0 success, 1 a check failed, 2 an option is wrong, 130 interrupted.

    Raises:
        SystemExit: --help, --version, or a command line that cannot be parsed (status 2).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(arguments)
    args.command_line = " ".join(["tokenferry", *arguments])
    errors = Screen(sys.stderr)
    try:
        status: int = COMMANDS[args.command].run(args, Screen())
        return status
    except ConfigError as error:
        errors.line(f"tokenferry {args.command}: {error}")
        return 2
    except (TokenferryError, OSError) as error:
        errors.line(f"tokenferry {args.command}: {error}")
        return 1
    except KeyboardInterrupt:
        errors.line(f"tokenferry {args.command}: interrupted")
        return 130
