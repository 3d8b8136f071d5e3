"""rail_send and rail_receive: messages between ranks of different nodes, each of which is one virtual rank."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from support.fake_network import RECEIVE, SEND, FakeNetwork, Put, Weather
from support.virtual_ranks import Ranks
from tokenferry.backends.cuda.across.puts import RegionSizes
from tokenferry.kernels.control_block import MESSAGE_HEAD_BYTES, RAIL_CHUNK_BYTES, RAIL_WORDS, Fault
from tokenferry.kernels.rail_receive import spec as receive_spec
from tokenferry.kernels.rail_send import spec as send_spec
from tokenferry.topology import Topology, consecutive

MOST_BYTES = 3 * RAIL_CHUNK_BYTES
MAPPED = {"all": lambda rank: True, "some": lambda rank: rank == 0, "none": lambda rank: False}
STORM = Weather(delay_s=0.01, reorder=True, seed=3)


class Rail:
    """N virtual ranks that are rail peers.

    Attributes:
        ranks: The ranks.
        fake: Their network.
        made: Exchanges that were made.
    """

    def __init__(self, num_nodes: int, weather: Weather, mapped: Callable[[int], bool]) -> None:
        self.ranks, self.num_nodes, self.made = Ranks(num_nodes), num_nodes, 0
        sizes = RegionSizes(num_nodes, MESSAGE_HEAD_BYTES + MOST_BYTES, MOST_BYTES // RAIL_CHUNK_BYTES)
        self.fake = FakeNetwork(num_nodes, sizes, self.ranks.device, weather)
        nodes = consecutive(num_nodes, 1)
        self._networks = [self.fake.network(Topology(rank, nodes), mapped) for rank in range(num_nodes)]
        self.states = [self.ranks.poisoned(num_nodes, 2, dtype=torch.int32) for _ in range(num_nodes)]
        self.masked_out = [self.ranks.pinned(torch.zeros(num_nodes, dtype=torch.int32)) for _ in range(num_nodes)]
        self.came = [self.ranks.poisoned(num_nodes, RAIL_WORDS, dtype=torch.int32) for _ in range(num_nodes)]

    def send(self, body_bytes: int, headers: bool = True) -> list[Tensor]:
        """Let all ranks send; return the bodies of each."""
        self.made += 1
        made = torch.Generator().manual_seed(self.made)
        shape = (self.num_nodes - 1, body_bytes)
        bodies = [torch.randint(0, 255, shape, generator=made, dtype=torch.uint8) for _ in range(self.num_nodes)]
        words = [self.words(rank) for rank in range(self.num_nodes)]
        fields = [
            {
                **self._fields(rank, body_bytes),
                "bodies": self.ranks.on_device(bodies[rank]),
                **({"headers": self.ranks.on_device(words[rank])} if headers else {}),
            }
            for rank in range(self.num_nodes)
        ]
        self.ranks.launch(SEND, fields, (2, send_spec.THREADS, 0))
        self.ranks.wait()
        return bodies

    def words(self, rank: int) -> Tensor:
        """Return the words of a rank for all others in the latest exchange."""
        first = 1000 * self.made + 100 * rank
        return torch.arange(first, first + self.num_nodes * RAIL_WORDS, dtype=torch.int32).view(-1, RAIL_WORDS)

    def receive(
        self,
        body_bytes: int,
        headers: bool = True,
        timeout_s: float = 60.0,
        ranks: Collection[int] = range(8),
        mask_late: bool = False,
    ) -> list[Tensor]:
        """Let ranks receive; return the bodies of each, of which what has not come is poison."""
        into = [
            self.ranks.poisoned(self.num_nodes - 1, max(body_bytes, 16), dtype=torch.uint8)
            for _ in range(self.num_nodes)
        ]
        fields = [
            {
                **self._fields(rank, body_bytes),
                "bodies": into[rank],
                "states": self.states[rank],
                "timeout_s": timeout_s,
                "waits": 1,
                "mask_late": int(mask_late),
                "masked_out": self.masked_out[rank],
                **({"headers": self.came[rank]} if headers else {}),
            }
            if rank in ranks
            else None
            for rank in range(self.num_nodes)
        ]
        self.ranks.launch(RECEIVE, fields, (2, receive_spec.THREADS, 0))
        self.ranks.wait()
        return [tensor.cpu() for tensor in into]

    def check(self, sent: list[Tensor], got: list[Tensor], headers: bool) -> None:
        """Compare all that came."""
        for rank, node in ((rank, node) for rank in range(self.num_nodes) for node in range(self.num_nodes)):
            if node == rank:
                continue
            want = sent[node][rank - (rank > node)]
            assert torch.equal(got[rank][node - (node > rank)][: len(want)], want), f"{node} to {rank}"
            assert self.states[rank][node].tolist() == [0, 0]
            if headers:
                assert torch.equal(self.came[rank][node].cpu(), self.words(node)[rank])

    def _fields(self, rank: int, body_bytes: int) -> dict[str, Any]:
        network = self._networks[rank]
        return {
            "body_bytes": body_bytes,
            "num_nodes": self.num_nodes,
            "node": rank,
            "region": network.region,
            "network": network.table,
            "message_bytes": network.sizes.message_bytes,
            "max_chunks": network.sizes.max_chunks,
            "skips": 1,
        }


@pytest.fixture
def rail_of() -> Iterator[Callable[..., Rail]]:
    """Make rails whose networks end with the test."""
    made: list[Rail] = []

    def make(num_nodes: int, weather: Weather = STORM, mapped: str = "none") -> Rail:
        made.append(Rail(num_nodes, weather, MAPPED[mapped]))
        return made[-1]

    yield make
    for rail in made:
        rail.fake.close()


@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("num_nodes", [2, 3])
def test_messages_come_as_they_were_sent(rail_of, num_nodes, mapped):
    """Of all sizes, one exchange after the other, with and without headers."""
    rail = rail_of(num_nodes, mapped=mapped)
    for i, body_bytes in enumerate(
        (16, RAIL_CHUNK_BYTES, MOST_BYTES, RAIL_CHUNK_BYTES + 16, 4096, MOST_BYTES - 16, 48)
    ):
        sent = rail.send(body_bytes, headers=i % 3 != 2)
        rail.check(sent, rail.receive(body_bytes, headers=i % 3 != 2), headers=i % 3 != 2)
        rail.ranks.check_quiet()
    if mapped == "none":
        assert rail.fake.report.puts == num_nodes * (num_nodes - 1) * (1 + 1 + 3 + 2 + 1 + 3 + 1)
        assert rail.fake.report.reordered > 0 or num_nodes == 2


def test_what_a_rank_has_put_is_complete_when_it_has_received(rail_of):
    """So that it may be sent from the same memory again, or the process may end."""
    late: list[int] = []
    rail = rail_of(2, Weather(delay_s=0.5, is_late=late.__contains__))
    rail.send(MOST_BYTES)
    rail.receive(MOST_BYTES)  # compiles the kernels, which takes longer
    late.append(0)
    sent = rail.send(MOST_BYTES)
    assert rail.fake.num_complete(0) < 6, "the network is late"
    first = rail.receive(MOST_BYTES, ranks=[0])
    assert rail.fake.num_complete(0) == 6
    rail.check(sent, [first[0], rail.receive(MOST_BYTES, ranks=[1])[1]], headers=True)


def test_heads_without_bodies(rail_of):
    rail = rail_of(3)
    sent = rail.send(0)
    rail.check(sent, rail.receive(0), headers=True)


def test_bodies_of_other_sizes_are_left_where_they_are(rail_of):
    """The head comes, which says what call the other rank has made."""
    rail = rail_of(2)
    sent = rail.send(RAIL_CHUNK_BYTES)
    got = rail.receive(MOST_BYTES)
    rail.ranks.check_quiet()
    rail.check([tensor[:, :0] for tensor in sent], got, headers=True)
    assert len(set(got[0].flatten().tolist())) == 1, "all is poison"


def test_a_rank_that_has_failed_sends_its_state_alone(rail_of):
    rail = rail_of(2)
    sent = rail.send(MOST_BYTES)
    rail.check(sent, rail.receive(MOST_BYTES), headers=True)
    rail.ranks.words(1, "failed").fill_(5)
    rail.ranks.words(1, "stopped").fill_(1)
    rail.send(MOST_BYTES)
    got = rail.receive(MOST_BYTES)
    assert rail.states[0][1].tolist() == [1, 5]
    assert len(set(got[0].flatten().tolist())) == 1, "all is poison"
    assert torch.equal(rail.came[0][1].cpu(), rail.words(1)[0])


@pytest.mark.parametrize("chunk", [0, 2])
def test_a_put_that_is_lost(rail_of, chunk):
    """The record names the rail peer, and no other chunk is taken for this one."""

    def is_lost(put: Put) -> bool:
        return (put.sender, put.exchange, put.number % 3) == (1, 2, chunk)

    rail = rail_of(2, Weather(loses=is_lost))
    sent = rail.send(MOST_BYTES)
    rail.check(sent, rail.receive(MOST_BYTES), headers=True)
    rail.send(MOST_BYTES)
    rail.receive(MOST_BYTES, timeout_s=0.5)
    record = rail.ranks.record(0)
    assert record is not None
    assert (record.code, record.word, record.seen, record.expected) == (Fault.late_node, 1 * 2 + 0, 0, 2)
    assert 450 <= record.waited_ms < 60_000


def test_a_rank_that_is_late_is_masked_and_told_so_once(rail_of):
    """The one across goes on, and nothing crosses between the two, but one head; others see nothing of it."""
    lost: list[Put] = []

    def is_lost(put: Put) -> bool:
        late = (put.sender, put.rank, put.exchange) == (1, 0, 2)
        if (put.sender, put.rank) == (0, 1) and put.exchange > 2:
            lost.append(put)
        return late

    rail = rail_of(3, Weather(loses=is_lost))
    sent = rail.send(MOST_BYTES)
    rail.check(sent, rail.receive(MOST_BYTES, mask_late=True), headers=True)
    sent = rail.send(MOST_BYTES)
    got = rail.receive(MOST_BYTES, timeout_s=0.5, ranks=[0], mask_late=True)
    assert rail.masked_out[0].tolist() == [0, 1, 0]
    assert torch.equal(got[0][1], sent[2][0]), "what other ranks have sent has come"
    rail.receive(MOST_BYTES, ranks=[1, 2], mask_late=True)
    for told in (1, 0, 0):
        lost.clear()
        sent = rail.send(RAIL_CHUNK_BYTES)
        got = rail.receive(RAIL_CHUNK_BYTES, timeout_s=20.0, mask_late=True)
        assert [put.num_bytes for put in lost] == [MESSAGE_HEAD_BYTES] * told
        assert [rail.masked_out[rank].tolist() for rank in range(3)] == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
        for rank, other in ((0, 2), (2, 0), (1, 2), (2, 1)):
            want = sent[other][rank - (rank > other)]
            assert torch.equal(got[rank][other - (other > rank)][: len(want)], want)
    rail.ranks.check_quiet()
