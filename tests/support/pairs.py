"""The pairs of backend and transport that pass the same suite. A new backend is one more line."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from support.on_device import OnDevice
from tokenferry import ExpertGroup, MoeShape


@dataclass(frozen=True)
class Pair:
    """A backend and a transport; the transport "none" is a group of one rank without a process group.

    ``ranks_per_node``: how many ranks form a node; None: all do.
    """

    backend: str
    transport: str
    ranks_per_node: int | None = None

    def __str__(self) -> str:
        nodes = "" if self.ranks_per_node is None else f"-nodes_of_{self.ranks_per_node}"
        return f"{self.backend}-{self.transport}{nodes}"

    @property
    def device(self) -> torch.device:
        """The device of this rank's tensors."""
        return torch.device("cpu") if self.backend == "cpu" else torch.device("cuda", torch.cuda.current_device())

    def open(self, pg: dist.ProcessGroup | None, shape: MoeShape, **options) -> ExpertGroup:
        transport = self.transport if self.transport in ("shared_memory", "process_group") else "auto"
        transport = "nvshmem" if "nvshmem" in self.transport else transport
        kind = ExpertGroup if self.backend == "cpu" else OnDevice
        options = {"timeout_s": 30, "ranks_per_node": self.ranks_per_node, **options}
        group = kind(pg, shape, backend=self.backend, transport=transport, **options)
        assert group.backend == self.backend
        assert group.transport == ("none" if group.num_ranks == 1 else self.transport)
        return group


NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

CPU_PAIRS = (Pair("cpu", "shared_memory"), Pair("cpu", "process_group"))
NODES = [
    (Pair("cpu", "shared_memory+process_group", ranks_per_node=2), 4),
    (Pair("cpu", "shared_memory+process_group", ranks_per_node=2), 6),
    (Pair("cpu", "shared_memory+process_group", ranks_per_node=4), 8),
    (Pair("cpu", "process_group", ranks_per_node=1), 4),
]
"""Groups of several nodes: 2 x 2, 3 x 2, 2 x 4 and 4 x 1."""

_CUDA_PAIR = Pair("cuda", "nvlink")
if os.environ.get("TEST_CUDA_NODES") == "1":
    _CUDA_PAIR = Pair("cuda", "nccl", ranks_per_node=1)
CUDA_PAIRS = (_CUDA_PAIR,) if NUM_GPUS else ()
"""TEST_CUDA_NODES=1 runs the contract suite across nodes: each rank is one, and NCCL joins them by sockets."""
PAIRS = CPU_PAIRS + CUDA_PAIRS
CONTRACT_PAIRS = (*CPU_PAIRS, Pair("cpu", "process_group", ranks_per_node=1), *CUDA_PAIRS)
"""Those on which the tests of the contract run that name no number of ranks."""

CUDA_RANKS = tuple(int(ranks) for ranks in os.environ.get("TEST_CUDA_RANKS", "").split(",") if ranks) or tuple(
    ranks for ranks in (1, 2, 3, 4, 5, 8) if ranks <= max(NUM_GPUS, 3)
)
"""R with GPUs: a rank each; up to three ranks may share one. TEST_CUDA_RANKS=5,6,7 names others, which share GPUs."""

PLACES = [
    (Pair("cpu", "none"), 1),
    *((pair, ranks) for pair in CPU_PAIRS for ranks in (1, 2, 3, 4, 5)),
    *NODES,
    *((Pair("cuda", "none"), 1) for _ in CUDA_PAIRS),
    *((pair, ranks) for pair in CUDA_PAIRS for ranks in CUDA_RANKS),
]
"""Every pair with every number of ranks that the suite runs."""
