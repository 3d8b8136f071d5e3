"""Setup of the CUDA backend: whether these ranks can use it, how large the windows are, and the shared windows."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from tokenferry import tuning
from tokenferry.backends.base import Resolved
from tokenferry.backends.cuda.across.backend import AcrossBackend
from tokenferry.backends.cuda.across.rails import Rails
from tokenferry.backends.cuda.backend import CudaBackend
from tokenferry.backends.cuda.context import Context
from tokenferry.backends.cuda.peers import Peers, Process
from tokenferry.backends.cuda.plan import too_large
from tokenferry.backends.cuda.runtime import Runtime, cuda_runtime
from tokenferry.errors import BackendUnavailable
from tokenferry.jit.kernel import Jit
from tokenferry.kernels.control_block import CONTROL_BLOCK_BYTES, MAX_RANKS, OFFSET_BYTES
from tokenferry.memory.reach import obstacle
from tokenferry.memory.window import Window, share
from tokenferry.topology import Topology
from tokenferry.transports.handshake import Bootstrap, agree
from tokenferry.transports.refused import resource_error
from tokenferry.transports.rendezvous import compare_terms


def why_not_cuda(group: dist.ProcessGroup | None, resolved: Resolved) -> str:
    """Return why these ranks cannot run the CUDA backend, the same on all ranks; empty if they can. Collective.

    Raises:
        PeerTimeout: a rank did not answer in time.
    """
    rank, num_ranks = _rank_and_size(group)
    table = _table(group, resolved, _device())
    reason = obstacle(table, rank, _device()) or _unfit(resolved, num_ranks)
    if not reason:
        try:
            Jit(torch.cuda.current_device(), None).close()
        except (RuntimeError, OSError, MemoryError) as error:
            reason = f"rank {rank}: {resource_error('loading CUDA', error) or error}"
    return agree(table, reason) if table else reason


def make_cuda_backend(group: dist.ProcessGroup | None, resolved: Resolved) -> CudaBackend:
    """Share windows with the other ranks, and load the kernels; collective.

    Raises:
        BackendUnavailable: a rank cannot run the backend; says which and why, on all ranks.
        ConfigError: ranks have different shapes or options.
        PeerTimeout: a rank did not answer in time.
    """
    why_not = why_not_cuda(group, resolved)
    if why_not:
        raise BackendUnavailable(f"ExpertGroup: backend='cuda' cannot run: {why_not}; use backend='cpu' or 'auto'")
    rank, num_ranks = _rank_and_size(group)
    device = _device()
    assert device is not None
    table = _table(group, resolved, device)
    num_bytes = CONTROL_BLOCK_BYTES + heap_bytes(
        resolved, num_ranks, torch.cuda.get_device_properties(device).total_memory
    )
    key = secrets.token_hex(4)
    peers = None
    if table:
        terms = {
            "shape": str(resolved.shape),
            "on_timeout": "mask" if resolved.mask_on_timeout else "raise",
            "heap bytes": num_bytes,
        }
        handshakes = table.exchange({"terms": terms, "key": key, "process": asdict(Process.this())})
        compare_terms([handshake["terms"] for handshake in handshakes])
        key = handshakes[0]["key"]
        peers = Peers([Process(**handshake["process"]) for handshake in handshakes])
    window = share(table, rank, num_ranks, device, num_bytes, CONTROL_BLOCK_BYTES)
    why = "every rank has a GPU that reaches its peers" if num_ranks > 1 else "a group of one rank with a GPU"
    backend, why_not = None, ""
    try:
        backend = assemble(window, resolved, key, why)
    except (RuntimeError, OSError, MemoryError) as error:  # such as for want of pinned memory
        why_not = f"rank {rank}: {resource_error('making the group', error) or error}"
    why_not = agree(table, why_not) if table else why_not
    if backend is None or why_not:
        (window if backend is None else backend).close()
        raise BackendUnavailable(f"ExpertGroup: backend='cuda' cannot run: {why_not}; use backend='cpu' or 'auto'")
    if peers:
        backend.context.watch(peers)
    return backend


def assemble(window: Window, resolved: Resolved, key: str, why: str, runtime: Runtime | None = None) -> CudaBackend:
    """Return the backend of one rank over its window; local.

    Args:
        window: The memory that the ranks share.
        resolved: Shape and options.
        key: Key of the group, which its plans carry.
        why: Why this backend was chosen.
        runtime: Kernels and streams; None: those of the window's GPU.
    """
    runtime = runtime or cuda_runtime(window.device, Path(resolved.cache_folder))
    context = Context(window, runtime, resolved.timeout_s, mask_late=resolved.mask_on_timeout)
    return CudaBackend(context, key, why, fast_path=resolved.fast_path)


def assemble_across(
    window: Window, resolved: Resolved, key: str, topology: Topology, rails: Rails, runtime: Runtime | None = None
) -> AcrossBackend:
    """Return the backend of one rank of several nodes over the window of its node; local.

    Args:
        window: The memory that the ranks of this node share.
        resolved: Shape and options.
        key: Key of the group, which its plans carry.
        topology: The nodes.
        rails: What carries exchanges between nodes.
        runtime: Kernels and streams; None: those of the window's GPU.
    """
    runtime = runtime or cuda_runtime(window.device, Path(resolved.cache_folder))
    first = topology.nodes[topology.node][0]
    context = Context(window, runtime, resolved.timeout_s, mask_late=resolved.mask_on_timeout, first_rank=first)
    why = f"every rank has a GPU that reaches its peers, on {topology}"
    return AcrossBackend(context, key, why, topology, rails)


def heap_bytes(resolved: Resolved, num_ranks: int, memory_bytes: int) -> int:
    """Return the bytes for rows that peers write or read: those of the options, or those for the shape. Pure."""
    if resolved.heap_bytes is not None:
        return resolved.heap_bytes
    return min(tuning.heap_bytes(resolved.shape, num_ranks), memory_bytes // 4)


def _unfit(resolved: Resolved, num_ranks: int) -> str:
    """Return why this backend cannot support a shape or honour an option; empty if it can."""
    if resolved.cpu_only:
        return resolved.cpu_only
    if num_ranks > MAX_RANKS:
        return f"ranks={num_ranks}, and at most {MAX_RANKS} are possible"
    if num_ranks > (resolved.ranks_per_node or num_ranks):
        return f"ranks_per_node={resolved.ranks_per_node} makes several nodes of {num_ranks} ranks, and it has one"
    heap_bytes = resolved.heap_bytes or 0
    most = (OFFSET_BYTES << 32) - CONTROL_BLOCK_BYTES  # handshakes have offsets of 32 bits
    if heap_bytes > most:
        return f"TOKENFERRY_HEAP_MB={heap_bytes >> 20}, and at most {most >> 20} are possible"
    return too_large(resolved.shape)


def _rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank(), group.size())


def _device() -> torch.device | None:
    """Return the device of this rank; None if there is none, or none that works."""
    try:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    except RuntimeError:  # CUDA cannot be initialised; the ranks agree on what to do
        return None


def _table(group: dist.ProcessGroup | None, resolved: Resolved, device: torch.device | None) -> Bootstrap | None:
    return None if group is None or group.size() == 1 else Bootstrap(group, resolved.timeout_s, device)
