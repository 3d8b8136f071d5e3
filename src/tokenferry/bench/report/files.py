"""Files that commands write."""

from __future__ import annotations

from pathlib import Path


def with_folder(file: Path) -> Path:
    """Make the folder of a file that is to be written, if there is none; return the file.

    Not before the file is written: a command that fails earlier leaves no empty folders.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    return file
