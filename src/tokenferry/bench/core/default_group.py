"""The default process group of ranks, for software that knows no other."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tokenferry.bench.core.device import gather

GROUP_TIMEOUT_S = 300.0


def replace_default_group(pg: dist.ProcessGroup, backend: str) -> dist.ProcessGroup:
    """Replace the default process group by one of another backend; return one of gloo beside it. Collective."""
    rank, num_ranks = pg.rank(), pg.size()
    timeout = timedelta(seconds=GROUP_TIMEOUT_S)
    master = TCPStore("127.0.0.1", 0, None, True, timeout, False) if rank == 0 else None
    port = gather(pg, None if master is None else master.port)[0]
    store = master or TCPStore("127.0.0.1", port, None, False, timeout, False)
    dist.barrier(pg)
    dist.destroy_process_group()
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    beside: dist.ProcessGroup = dist.new_group(range(num_ranks), timeout=timeout, backend="gloo")
    return beside
