"""`tokenferry completion`: print what makes a shell complete commands, options and their values."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from tokenferry.cli.parser import COMMANDS, make_parser
from tokenferry.cli.screen import Screen

DESCRIPTION = """\
Prints a script that makes a shell complete the commands, their options and the values of options. To use it in this
shell, and in each new one if the line stands in ~/.bashrc or ~/.zshrc:

    source <(tokenferry completion bash)
    source <(tokenferry completion zsh)
"""
HEADS = {"bash": "", "zsh": "autoload -U +X bashcompinit && bashcompinit\n"}
SCRIPT = """\
_tokenferry() {{
    local words command="${{COMP_WORDS[1]}}"
    if [[ $COMP_CWORD -gt 2 ]]; then
        case "$command ${{COMP_WORDS[2]}}" in
            {parts}) command+=" ${{COMP_WORDS[2]}}" ;;
        esac
    fi
    case "$command ${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
        *)
            case "$command" in
{options}
            esac ;;
    esac
    if [[ $COMP_CWORD == 1 ]]; then words="{commands} --help --version"; fi
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _tokenferry tokenferry
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the shell."""
    parser.add_argument("shell", choices=tuple(HEADS), help="the shell that reads the script")


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Print the script."""
    parsers = dict(_parsers(make_parser()))
    values = "\n".join(
        f'        "{command} {option}") words="{" ".join(choices)}" ;;'
        for command, parser in parsers.items()
        for option, choices in _values(parser)
    )
    options = "\n".join(
        f'                "{command}") words="{" ".join(_words(parser))}" ;;' for command, parser in parsers.items()
    )
    parts = "|".join(f'"{command}"' for command in parsers if " " in command)
    script = SCRIPT.format(parts=parts, values=values, options=options, commands=" ".join(COMMANDS))
    screen.line(HEADS[args.shell] + script.rstrip())
    return 0


def _parsers(parser: argparse.ArgumentParser, before: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield each command, and each part of one, with its parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, one in action.choices.items():
                yield before + name, one
                yield from _parsers(one, f"{before}{name} ")


def _values(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    for action in parser._actions:
        for option in action.option_strings if action.choices else ():
            yield option, list(map(str, action.choices or ()))


def _words(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options and, of arguments without a name, the values."""
    words: list[str] = []
    for action in parser._actions:
        words += [one for one in action.option_strings if one.startswith("--")] or map(str, action.choices or ())
    return words
