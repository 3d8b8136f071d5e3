"""Files that commands write: their names are checked before anything is measured; ``-`` is standard output.

Folders that do not exist are made when the first file is written, for every option and command.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from tokenferry.bench.report.files import with_folder
from tokenferry.cli.screen import Screen

STDOUT = Path("-")
PICTURES = (".png", ".svg", ".pdf")


def output_file(text: str) -> Path:
    """Parse the name of a file to write, or ``-``.

    Raises:
        argparse.ArgumentTypeError: it cannot be written.
    """
    path = Path(text)
    if path == STDOUT:
        return path
    if path.is_dir() or text.endswith("/"):
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file in it")
    if not path.exists():
        output_folder(str(path.parent))
    elif not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} may not be written; choose another")
    return path


def output_folder(text: str) -> Path:
    """Parse the name of a folder for files.

    Raises:
        argparse.ArgumentTypeError: it cannot be made, or files in it cannot be.
    """
    path = Path(text)
    existing = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not existing.is_dir():
        raise argparse.ArgumentTypeError(f"{existing} is not a folder; choose another")
    if not os.access(existing, os.W_OK):
        raise argparse.ArgumentTypeError(f"{existing} may not be written; choose another")
    return path


def picture_file(text: str) -> Path:
    """Parse the name of a picture to write.

    Raises:
        argparse.ArgumentTypeError: it cannot be written.
    """
    path = output_file(text)
    if path.suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"{path}: expected a name that ends in {', '.join(PICTURES)}")
    return path


def add_json(parser: argparse.ArgumentParser, what: str = "report") -> None:
    """Declare ``--json``."""
    text = f"write the {what} to FILE as well; -: to standard output, and the text to standard error"
    parser.add_argument("--json", type=output_file, metavar="FILE", help=text)


def write_json(value: Any, file: Path, screen: Screen, *, note: str = "") -> None:  # noqa: ANN401 - what json takes
    """Write a report to its file, or to standard output."""
    text = json.dumps(value, indent=1)
    if file == STDOUT:
        Screen(fancy=False).line(text)
        return
    with_folder(file).write_text(text + "\n", encoding="utf-8")
    screen.line(f"written: {file}{note}")
