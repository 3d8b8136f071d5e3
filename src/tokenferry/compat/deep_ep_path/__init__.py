"""A folder that holds only a package `deep_ep`, which re-exports `tokenferry.compat.deep_ep`."""

from __future__ import annotations

import os


def folder() -> str:
    """Return the folder to put on PYTHONPATH so that ``import deep_ep`` finds tokenferry. Local."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "site")
