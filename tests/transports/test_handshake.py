"""Handshakes reach every rank over whatever a process group has: CPU tensors, a store, or tensors of a device."""

import re
import time

import pytest
import torch
import torch.distributed as dist

from tokenferry.errors import PeerTimeout
from tokenferry.transports import handshake as handshakes
from tokenferry.transports.base import Deadline

CARRIERS = ("cpu", "store", "tensors")


class WithoutCpu:
    """A process group without a backend for CPU tensors, like NCCL's."""

    def __init__(self, pg, store):
        self._pg = pg
        self._has_store = store
        self.rank, self.size, self.allgather = pg.rank, pg.size, pg.allgather

    def _get_backend(self, device):
        raise RuntimeError(f"No backend type associated with device type {device}")

    def get_group_store(self):
        if not self._has_store:
            raise RuntimeError("no store")
        return self._pg.get_group_store()


def bootstrap(pg, carrier, timeout_s=10.0):
    group = pg if carrier == "cpu" else WithoutCpu(pg, carrier == "store")
    return handshakes.Bootstrap(group, timeout_s)


def swap(rank, pg, carrier):
    """Use two bootstraps in turn, with handshakes of different lengths and a late rank."""
    seen = []
    for name in ("first", "second"):
        channel = bootstrap(pg, carrier)
        for number in range(3):
            time.sleep(0.1 * (rank == number))
            seen.append(channel.exchange({"name": name, "number": number, "text": "ä" * (100 * rank), "rank": rank}))
    return seen


@pytest.mark.parametrize("carrier", CARRIERS)
def test_every_rank_gets_every_handshake(worlds, carrier):
    expected = [
        [{"name": name, "number": number, "text": "ä" * (100 * rank), "rank": rank} for rank in range(3)]
        for name in ("first", "second")
        for number in range(3)
    ]
    assert worlds(3).run(swap, carrier) == [expected] * 3


def absent(rank, pg):
    """Rank 1 makes the first exchange only. The keys have a prefix, since the ranks' counts differ afterwards."""
    store = dist.PrefixStore("absent", pg.get_group_store())
    carrier = handshakes._Store(pg, store)
    carrier.exchange(b"{}", Deadline(10.0))
    if rank == 1:
        return None
    try:
        carrier.exchange(b"{}", Deadline(0.3))
    except PeerTimeout as error:
        return error.peers, str(error)
    return "no error"


def test_a_store_names_the_missing_rank(worlds):
    results = worlds(3).run(absent)
    for rank in (0, 2):
        peers, text = results[rank]
        assert peers == (1,)
        assert re.match(rf"making the group: rank {rank} waited \S+ s for rank 1: no answer within timeout_s", text)


def leftovers(rank, pg):
    store = dist.PrefixStore("leftovers", pg.get_group_store())
    carrier = handshakes._Store(pg, store)
    for _ in range(4):
        carrier.exchange(b"{}", Deadline(10.0))
    return [number for number in range(1, 5) if store.check([f"tokenferry/{number}/{rank}"])]


def test_a_store_keeps_one_handshake_of_each_rank(worlds):
    assert worlds(2).run(leftovers) == [[4], [4]]


def test_a_store_that_fails_is_a_timeout_of_all_others():
    class Broken:
        def add(self, key, amount):
            raise RuntimeError("connection reset by peer\nand a long stack")

    class Group:
        rank, size = staticmethod(lambda: 1), staticmethod(lambda: 3)

    with pytest.raises(PeerTimeout, match=r"ranks 0, 2: the process group's store failed \(connection reset by peer\)"):
        handshakes._Store(Group(), Broken()).exchange(b"{}", Deadline(1.0))


def test_missing_tensors_end_at_the_deadline():
    class Never:
        def is_completed(self):
            return False

    class Group:
        rank, size = staticmethod(lambda: 1), staticmethod(lambda: 3)

        def allgather(self, outputs, inputs):
            return Never()

    start = time.monotonic()
    with pytest.raises(PeerTimeout, match=r"rank 1 waited \S+ s for ranks 0, 2") as caught:
        handshakes._Tensors(Group(), torch.device("cpu")).exchange(b"{}", Deadline(0.2))
    assert 0.2 <= caught.value.waited_s <= time.monotonic() - start < 30.0


def only_nccl_like(rank, pg):
    """The CPU backend over a group without CPU tensors: shared memory works, messages over the group cannot."""
    from tokenferry.errors import BackendUnavailable
    from tokenferry.transports import rendezvous

    group = WithoutCpu(pg, True)
    agreement = rendezvous.connect(group, rendezvous.Wanted("auto", None), 10.0, {"shape": "same"})
    agreement.transport.close(linger=False)
    try:
        rendezvous.connect(group, rendezvous.Wanted("process_group", None), 10.0, {"shape": "same"})
    except BackendUnavailable as error:
        return agreement.transport.name, str(error)
    return None


def test_ranks_with_only_a_store_can_share_memory(worlds):
    for name, text in worlds(2).run(only_nccl_like):
        assert name == "shared_memory"
        assert "transport='process_group' was asked for, and the process group cannot move CPU tensors" in text
        assert "'cpu:gloo,cuda:nccl'" in text
