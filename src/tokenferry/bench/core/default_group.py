"""The default process group of ranks, for software that knows no other."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tokenferry.bench.core.device import gather
from tokenferry.bench.core.session import Session, Settings, in_session
from tokenferry.testing.world import Progress

GROUP_TIMEOUT_S = 300.0


def in_default_group(
    rank: int, pg: dist.ProcessGroup, progress: Progress, settings: Settings, measure: Callable[[Session], None]
) -> None:
    """Do as `in_session`, after the default process group has become one for the device's tensors."""
    replace_default_group(pg, settings.pg_backend)
    timeout = timedelta(seconds=GROUP_TIMEOUT_S)
    beside = dist.new_group(range(settings.ranks), timeout=timeout, backend="gloo")
    in_session(rank, beside, progress, settings, measure)


def replace_default_group(pg: dist.ProcessGroup, backend: str) -> None:
    """End all process groups, and make the default one of the same ranks again. Collective.

    Args:
        pg: The default process group, for tensors of the CPU.
        backend: ``"nccl"`` or ``"gloo"``.
    """
    rank, num_ranks, timeout = pg.rank(), pg.size(), timedelta(seconds=GROUP_TIMEOUT_S)
    master = TCPStore("127.0.0.1", 0, None, True, timeout, False) if rank == 0 else None
    port = gather(pg, None if master is None else master.port)[0]
    store = master or TCPStore("127.0.0.1", port, None, False, timeout, False)
    dist.barrier(pg)
    dist.destroy_process_group()
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
