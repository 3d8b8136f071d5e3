"""The choice of a group's backend; logged in one line, never a silent fallback."""

from __future__ import annotations

import logging

import torch.distributed as dist

from tokenferry.backends.base import Backend, Resolved
from tokenferry.backends.cpu.backend import make_cpu_backend
from tokenferry.errors import BackendUnavailable, ConfigError
from tokenferry.transports.handshake import Bootstrap, agree, compare_terms
from tokenferry.transports.refused import resource_error

_log = logging.getLogger("tokenferry")
_announced: set[str] = set()
"""The choices that have been logged already."""


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
        if resolved.cuda_only:
            raise ConfigError(f"ExpertGroup: backend='cpu': {resolved.cuda_only}; leave it out, or use backend='cuda'")
        return make_cpu_backend(group, resolved)
    if name == "cuda" and resolved.cpu_only:
        raise ConfigError(f"ExpertGroup: backend='cuda': {resolved.cpu_only}; leave it out, or use backend='cpu'")
    try:
        from tokenferry.backends.cuda.setup import make_cuda_backend, why_not_cuda
    except (ImportError, OSError) as error:  # such as for want of descriptors
        why_not = _decline_cuda(group, resolved, error)
        if name == "cuda" or resolved.cuda_only:
            raise BackendUnavailable(f"ExpertGroup: backend='cuda' cannot run: {why_not}") from error
    else:
        if name == "cuda":
            return make_cuda_backend(group, resolved)
        # Collective: every rank calls it, even one that knows its own answer.
        why_not = why_not_cuda(group, resolved)
        if why_not and resolved.cuda_only:
            raise BackendUnavailable(
                f"ExpertGroup: {resolved.cuda_only}, and backend='cuda' cannot run: {why_not}; leave it out"
            )
    backend = make_cpu_backend(group, resolved) if why_not else make_cuda_backend(group, resolved)
    instead = f"; not cuda: {why_not}" if why_not else ""
    choice = f"ExpertGroup: backend 'auto' chose {backend.name} ({backend.why}){instead}"
    _announce(choice, 0 if group is None else group.rank())
    return backend


def _announce(choice: str, rank: int) -> None:
    """Log a choice: the first time so that it is seen without any set-up, by one rank."""
    if rank == 0 and choice not in _announced:
        _announced.add(choice)
        _log.warning("%s. To hide this line, name the backend, or set TOKENFERRY_LOG=error", choice)
    else:
        _log.info("%s", choice)


def _decline_cuda(group: dist.ProcessGroup | None, resolved: Resolved, error: Exception) -> str:
    """Take part in `why_not_cuda` of the other ranks for one that cannot import it; return the reason. Collective."""
    why = str(resource_error("loading the CUDA backend", error) or f"the CUDA backend cannot be loaded ({error})")
    if group is None or group.size() == 1:
        return why
    bootstrap = Bootstrap(group, resolved.timeout_s)
    trouble = f" that works: {why}"
    compare_terms(
        bootstrap.exchange({"terms": resolved.terms, "host": "", "process": "", "device": None, "trouble": trouble})
    )
    reason = agree(bootstrap, f"rank {group.rank()}: {why}")
    return agree(bootstrap, reason)
