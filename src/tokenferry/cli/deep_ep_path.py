"""`tokenferry deep-ep-path`: print the folder that makes `import deep_ep` find tokenferry."""

from __future__ import annotations

import argparse

from tokenferry.cli.screen import Screen
from tokenferry.compat.deep_ep_path import folder

DESCRIPTION = """\
Prints one folder and nothing else. It contains a package `deep_ep`, which implements DeepEP's API with tokenferry, so
that programs written for DeepEP run unchanged:

    PYTHONPATH=$(tokenferry deep-ep-path) python program.py
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no options."""


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Print the folder."""
    screen.line(folder())
    return 0
