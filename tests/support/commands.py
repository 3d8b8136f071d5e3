"""The commands of the command line, and their options."""

import argparse
from collections.abc import Iterator

from tokenferry.cli.parser import make_parser


def options_of_all_commands() -> Iterator[tuple[str, argparse.Action]]:
    """Return each option with the words of its command, such as ``"bench cpu"``."""

    def below(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for part, parser_of_part in action.choices.items():
                    yield from below(f"{name} {part}".strip(), parser_of_part)
            else:
                yield name, action

    return below("", make_parser())
