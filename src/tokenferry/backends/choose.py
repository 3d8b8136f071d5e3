"""Which backend a group gets; said in one log line, never a silent fallback."""

from __future__ import annotations

import logging

import torch.distributed as dist

from tokenferry.backends.base import Backend, Resolved
from tokenferry.backends.cpu import make_cpu_backend
from tokenferry.errors import BackendUnavailable, ConfigError

_log = logging.getLogger("tokenferry")


def make_backend(group: dist.ProcessGroup | None, resolved: Resolved) -> Backend:
    """Make the backend that was asked for, or for ``"auto"`` the best that runs here; collective.

    Raises:
        BackendUnavailable: it cannot run here; says why.
        ConfigError: there is none of that name, or ranks disagree.
        PeerTimeout: a rank did not come.
    """
    name = resolved.backend
    if name == "cuda":
        raise BackendUnavailable(
            "ExpertGroup: backend='cuda' is not in this version of tokenferry; use 'cpu' or 'auto'"
        )
    if name not in ("auto", "cpu"):
        raise ConfigError(f"ExpertGroup: backend: expected 'auto' or 'cpu', got {name!r}")
    backend = make_cpu_backend(group, resolved)
    if name == "auto":
        _log.info("backend 'auto' chose cpu (%s): this version of tokenferry has no other", backend.why)
    return backend
