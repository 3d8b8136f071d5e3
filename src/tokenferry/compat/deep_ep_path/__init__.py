"""A folder with only a package `deep_ep`, which is `tokenferry.compat.deep_ep` under its bare name."""

from __future__ import annotations

import os


def folder() -> str:
    """Return the folder to put on PYTHONPATH so that ``import deep_ep`` finds tokenferry. Local."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "site")
