"""`Runtime`: the methods of DeepEP's C++ object, `Buffer.runtime`, that programs call."""

from __future__ import annotations

from typing import NoReturn

from tokenferry.api import ExpertGroup
from tokenferry.checks import check_flags
from tokenferry.errors import UnsupportedError


class Runtime:
    """The place of this rank among the nodes of the group, `ExpertGroup.topology`, in DeepEP's terms.

    Every method is local. Those with which DeepEP connects its ranks raise UnsupportedError: a `Buffer` is connected as
    soon as it has been made.
    """

    def __init__(self, group: ExpertGroup) -> None:
        self._group = group

    def is_available(self) -> bool:
        """Return True: a buffer can be used as soon as it has been made."""
        return True

    def is_internode_available(self) -> bool:
        """Return whether the group has several nodes."""
        return self.get_num_rdma_ranks() > 1

    def get_num_rdma_ranks(self) -> int:
        """Return the number of nodes in the group."""
        return self._group.topology.num_nodes

    def get_rdma_rank(self) -> int:
        """Return the index of this rank's node."""
        return self._group.topology.node

    def get_root_rdma_rank(self, global_: bool) -> int:
        """Return this rank's index in its node if ``global_``, else 0, as DeepEP does."""
        check_flags("Buffer.runtime.get_root_rdma_rank", global_=global_)
        return self._group.topology.local_rank if global_ else 0

    def get_local_device_id(self) -> int:
        """Return the index of this rank's GPU.

        Raises:
            UnsupportedError: the group is on the CPU.
        """
        device = self._group.device
        if device.index is None:
            raise UnsupportedError(
                f"Buffer.runtime.get_local_device_id: this group is on {device}, which has no number; leave it out"
            )
        return device.index

    def get_local_ipc_handle(self) -> NoReturn:
        """Raise UnsupportedError: ranks exchange their own handles of memory."""
        _refuse_to_connect("get_local_ipc_handle")

    def get_local_nvshmem_unique_id(self) -> NoReturn:
        """Raise UnsupportedError: the constructor of `Buffer` connects all ranks."""
        _refuse_to_connect("get_local_nvshmem_unique_id")

    def sync(self, *_: object, **__: object) -> NoReturn:
        """Raise UnsupportedError: the constructor of `Buffer` connects all ranks."""
        _refuse_to_connect("sync")


def _refuse_to_connect(method: str) -> NoReturn:
    raise UnsupportedError(f"Buffer.runtime.{method}: the constructor of Buffer connects all ranks; leave it out")
