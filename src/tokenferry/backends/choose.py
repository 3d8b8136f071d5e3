"""The choice of a group's backend; logged in one line, never a silent fallback."""

from __future__ import annotations

import logging

import torch.distributed as dist

from tokenferry.backends.base import Backend, Resolved
from tokenferry.backends.cpu.backend import make_cpu_backend
from tokenferry.errors import ConfigError

_log = logging.getLogger("tokenferry")


def make_backend(group: dist.ProcessGroup | None, resolved: Resolved) -> Backend:
    """Return the backend that was asked for, or for ``"auto"`` the best that runs here; collective.

    Raises:
        BackendUnavailable: it cannot run here; says why.
        ConfigError: there is no backend of that name, it cannot honour an option, or ranks disagree.
        PeerTimeout: a rank did not answer in time.
    """
    name = resolved.backend
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"ExpertGroup: backend: expected 'auto', 'cpu' or 'cuda', got {name!r}")
    if name == "cpu":
        return make_cpu_backend(group, resolved)
    if name == "cuda" and resolved.cpu_only:
        raise ConfigError(f"ExpertGroup: backend='cuda': {resolved.cpu_only}; leave it out, or use backend='cpu'")
    from tokenferry.backends.cuda.setup import make_cuda_backend, why_not_cuda

    if name == "cuda":
        return make_cuda_backend(group, resolved)
    # Collective: every rank calls it, even one that knows its own answer.
    why_not = why_not_cuda(group, resolved)
    backend = make_cpu_backend(group, resolved) if why_not else make_cuda_backend(group, resolved)
    instead = f"; not cuda: {why_not}" if why_not else ""
    _log.info("backend 'auto' chose %s (%s)%s", backend.name, backend.why, instead)
    return backend
