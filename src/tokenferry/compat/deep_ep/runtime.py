"""`Runtime`: the few questions that programs ask of DeepEP's C++ object, `Buffer.runtime`."""

from __future__ import annotations

from tokenferry.api import ExpertGroup
from tokenferry.compat.deep_ep.config import RANKS_PER_NODE


class Runtime:
    """Where this rank is, in DeepEP's terms: nodes of eight ranks in a row. Every method is local."""

    def __init__(self, group: ExpertGroup) -> None:
        self._group = group

    def is_available(self) -> bool:
        """Whether the buffer can be used."""
        return True

    def get_num_rdma_ranks(self) -> int:
        """Nodes in the group."""
        return -(-self._group.num_ranks // RANKS_PER_NODE)

    def get_rdma_rank(self) -> int:
        """This rank's node."""
        return self._group.rank // RANKS_PER_NODE

    def get_root_rdma_rank(self, global_: bool) -> int:
        """This rank's place in its node if ``global_``, else 0, as DeepEP has it."""
        return self._group.rank % RANKS_PER_NODE if global_ else 0
