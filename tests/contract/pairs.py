"""The (backend, wire) pairs that keep the same promises. A new backend is one more line."""

from dataclasses import dataclass

import torch.distributed as dist

from tokenferry import ExpertGroup, MoeShape


@dataclass(frozen=True)
class Pair:
    """How the ranks of a test reach each other; wire "none" is a group of one without a process group."""

    backend: str
    wire: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.wire}"

    def open(self, pg: dist.ProcessGroup | None, shape: MoeShape, **options) -> ExpertGroup:
        wire = "auto" if self.wire == "none" else self.wire
        group = ExpertGroup(
            pg, shape, backend=self.backend, wire=wire, timeout_s=options.pop("timeout_s", 30), **options
        )
        assert group.backend == self.backend
        assert group.wire == ("none" if group.num_ranks == 1 else self.wire)
        return group


ALONE = Pair("cpu", "none")
PAIRS = (Pair("cpu", "local"), Pair("cpu", "group"))
PLACES = [(ALONE, 1), *((pair, ranks) for pair in PAIRS for ranks in (1, 2, 3, 4, 5))]
"""Every pair with every number of ranks that the suite runs."""
