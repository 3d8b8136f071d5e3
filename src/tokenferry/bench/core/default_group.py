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
    timeout = timedelta(seconds=GROUP_TIMEOUT_S)
    master = TCPStore("127.0.0.1", 0, None, True, timeout, False) if rank == 0 else None
    port = gather(pg, None if master is None else master.port)[0]
    store = master or TCPStore("127.0.0.1", port, None, False, timeout, False)
    dist.barrier(pg)
    dist.destroy_process_group()
    dist.init_process_group(settings.pg_backend, store=store, rank=rank, world_size=settings.ranks, timeout=timeout)
    beside = dist.new_group(range(settings.ranks), timeout=timeout, backend="gloo")
    in_session(rank, beside, progress, settings, measure)
