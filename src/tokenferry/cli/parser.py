"""The parser of the command line. A command is imported when it is named, so that the rest of it needs no torch."""

from __future__ import annotations

import argparse
import difflib
import importlib
import itertools
import shutil
import sys
import textwrap
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import tokenferry
from tokenferry.cli.screen import fitted

COMMANDS = {
    "demo": "train a small Mixture-of-Experts model over local ranks, and compare with one process",
    "doctor": "run small checks of this machine, and print what works and why the rest does not",
    "explain-error": "show what an exception means, whether the group is still usable, and what to do",
    "explain": "show the bytes that dispatch and combine of given sizes move, the SMs that they take, and why",
    "plan": "estimate bytes, times and memory of dispatch and combine across nodes, and what bounds them",
    "limits": "measure the rates of the links between the GPUs of this host, and nothing else",
    "bench": "measure calls and training steps on this machine, beside what they replace",
    "trace": "draw a timeline of one decode call on all GPUs of this host, from time stamps inside the kernels",
    "diagnose": "find the rank that the others wait for, and whether it is slow in compute or in its link",
    "deep-ep-path": "print the folder to put on PYTHONPATH so that `import deep_ep` finds tokenferry",
    "completion": "print a script with which a shell completes commands and options",
}
"""The commands and their help; each is a module of this folder."""

DESCRIPTION = "Mixture-of-Experts dispatch and combine: try them, check this machine, run benchmarks."
EPILOG = (
    "Exit status: 0 success, 1 a check failed, 2 the command line is wrong, 3 not possible on this machine, "
    "130 interrupted, 141 the reader of the output has ended, 143 terminated."
)

NOT_POSSIBLE = 3
"""The exit status if this machine, or what is installed on it, cannot do what was asked for."""


class HelpFormatter(argparse.HelpFormatter):
    """Fits paragraphs to the terminal, and keeps lines that are indented."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for kept, group in itertools.groupby(text.splitlines(), lambda line: not line or line.startswith(" ")):
            block = list(group)
            lines += block if kept else textwrap.wrap(" ".join(block), width, break_on_hyphens=False)
        return "\n".join(indent + line for line in lines)


class Parser(argparse.ArgumentParser):
    """Breaks what it says about a wrong command line between words, as far as standard error is a terminal."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end with status 2."""
        self.print_usage(sys.stderr)
        line = f"{self.prog}: error: {message}"
        if sys.stderr.isatty():
            line = fitted(line, shutil.get_terminal_size().columns)
        self.exit(2, f"{line}\n")


def load(command: str) -> ModuleType:
    """Import the module of a command."""
    return importlib.import_module(f"tokenferry.cli.{command.replace('-', '_')}")


def make_parser(complete: Collection[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Return the parser; of the commands, only those in ``complete`` have their options."""
    parser = Parser(prog="tokenferry", description=DESCRIPTION, epilog=EPILOG, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=f"tokenferry {tokenferry.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        subparser = commands.add_parser(name, help=text, epilog=EPILOG, formatter_class=HelpFormatter)
        subparser.set_defaults(parser=subparser)
        if name in complete:
            module = load(name)
            subparser.description = module.DESCRIPTION
            module.add_arguments(subparser)
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse a command line.

    Raises:
        SystemExit: --help, --version, or the command line is wrong (status 2).
    """
    command = next((word for word in arguments if not word.startswith("-")), None)
    parser = make_parser(() if command is None else (command,))
    if command is not None and command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        parser.error(f"there is no command {command!r}; {hint}")
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        used: argparse.ArgumentParser = getattr(args, "parser", parser)  # of the command, or of its part
        near = difflib.get_close_matches(unknown[0], used._option_string_actions, n=1)
        used.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))
    written = getattr(args, "json", None)
    args.command_line = " ".join(["tokenferry", *(_without_folder(word, written) for word in arguments)])
    return args


def _without_folder(word: str, file: Path | None) -> str:
    """Return a word of a command line, without the folder if it names this file: reports keep no machine's paths."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return word if file is None or Path(value) != file else f"{option}{equals}{file.name}"
