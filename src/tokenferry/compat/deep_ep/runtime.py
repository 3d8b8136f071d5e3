"""`Runtime`: the methods of DeepEP's C++ object, `Buffer.runtime`, that programs call."""

from __future__ import annotations

from tokenferry.api import ExpertGroup
from tokenferry.compat.deep_ep.config import RANKS_PER_NODE


class Runtime:
    """The position of this rank in DeepEP's terms: nodes of eight consecutive ranks. Every method is local."""

    def __init__(self, group: ExpertGroup) -> None:
        self._group = group

    def is_available(self) -> bool:
        """Return True: a buffer can be used as soon as it has been made."""
        return True

    def get_num_rdma_ranks(self) -> int:
        """Return the number of nodes in the group."""
        return -(-self._group.num_ranks // RANKS_PER_NODE)

    def get_rdma_rank(self) -> int:
        """Return the index of this rank's node."""
        return self._group.rank // RANKS_PER_NODE

    def get_root_rdma_rank(self, global_: bool) -> int:
        """Return this rank's index in its node if ``global_``, else 0, as DeepEP does."""
        return self._group.rank % RANKS_PER_NODE if global_ else 0
