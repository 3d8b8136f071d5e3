"""The versions of each client that tokenferry has been tried with."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

_log = logging.getLogger("tokenferry")

TRIED = {
    "sglang": ("0.5.23",),
    "transformers": ("5.17", "5.18", "5.19", "5.20", "5.21", "5.22", "5.23", "5.24"),
    "vllm": ("0.33",),
}
"""What docs/clients.md says was run; ``"5.24"`` stands for all its patch releases."""


def installed(client: str) -> str | None:
    """Return the version of an installed client, or None. Local."""
    try:
        return version(client)
    except PackageNotFoundError:
        return None


def doubt(client: str) -> str:
    """Return a sentence about a client whose version was not tried; empty if it was, or if none is installed. Local."""
    found = installed(client)
    tried = TRIED[client]
    if found is None or any(f"{found}.".startswith(f"{each}.") for each in tried):
        return ""
    return f"{client} {found} was not tried, but {', '.join(tried)}; if it fails, install one of these"


def warn_unless_tried(client: str) -> None:
    """Log a warning if the installed version of a client was not tried. Local."""
    text = doubt(client)
    if text:
        _log.warning("tokenferry: %s", text)
