"""Files that commands write: their names are checked before anything is measured; ``-`` is standard output."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

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
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.parent}; make it, or choose another")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} may not be written; choose another")
    return path


def output_folder(text: str) -> Path:
    """Parse the name of a folder for files; if there is none yet, it is made when the first is written.

    Raises:
        argparse.ArgumentTypeError: it cannot be.
    """
    path = Path(text)
    existing = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not existing.is_dir():
        raise argparse.ArgumentTypeError(f"{existing} is not a folder; choose another")
    if not os.access(existing, os.W_OK):
        raise argparse.ArgumentTypeError(f"{existing} may not be written; choose another")
    return path


def picture_file(text: str) -> Path:
    """Parse the name of a picture to write; if there is no such folder yet, it is made then.

    Raises:
        argparse.ArgumentTypeError: it cannot be written.
    """
    path = Path(text)
    if path.is_dir():
        return output_file(text)
    if path.suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"{path}: expected a name that ends in {', '.join(PICTURES)}")
    return output_folder(str(path.parent)) / path.name


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
    file.write_text(text + "\n", encoding="utf-8")
    screen.line(f"written: {file}{note}")
