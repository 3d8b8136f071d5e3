"""Decode calls across nodes over NVSHMEM itself, between two GPUs whose memory it maps.

Its bootstrap, its memory, the pointers that it maps, and our own stores. What it puts itself needs a network card.
"""

import gc
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from support.decode_jobs import captured
from support.lost_ranks import CROWDED_S
from support.masks import TWO, Absence, Iterations, lost_in_replays, skip_and_return
from support.pairs import NUM_GPUS, Pair
from support.pools import prefer
from tokenferry import Scale
from tokenferry.backends.cuda.across import nvshmem
from tokenferry.testing.cases import Case
from tokenferry.testing.world import World

pytestmark = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")


PAIR = Pair("cuda", "nccl+nvshmem", ranks_per_node=1)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Ranks of their own: NVSHMEM is never finalised in a process."""
    reason = nvshmem.why_not()
    if reason:
        pytest.skip(reason)
    with World(2, devices="cuda", timeout_s=120.0) as made:
        made.run(prefer, "cuda")
        yield made


def rounds(rank: int, pg: dist.ProcessGroup, pair: Pair) -> int:
    """Return to how many other nodes this rank stores, in groups that come and go."""
    mapped = 0
    for sizes in (Case((3, 5), 8, 3, hidden=128, dtype=torch.float32), Case((2, 0), 4, 2, hidden=1024)):
        with pair.open(pg, sizes.shape) as group:
            assert group.transport == "nccl+nvshmem"
            group.warmup()
            iterations = Iterations(group, sizes)
            iterations.several(9)
            iterations.carefully()
            mapped = int((group._backend._puts.network.table[:2] != 0).sum())
        gc.collect()
    return mapped


def test_decode_calls_store_into_memory_that_nvshmem_has_mapped(world):
    assert world.run(rounds, PAIR) == [1, 1]


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("quantize", [None, Scale.FLOAT32])
def test_cuda_graphs(world, quantize, hooks):
    world.run(captured, PAIR, quantize, hooks)


@pytest.mark.parametrize("absence", [Absence("dispatch", hook=True), Absence("combine")], ids=str)
def test_a_node_that_is_away_comes_back(world, tmp_path, absence):
    world.run(skip_and_return, PAIR, str(tmp_path), CROWDED_S, absence, TWO)


def test_a_graph_outlives_a_node_that_is_away(world, tmp_path):
    world.run(lost_in_replays, PAIR, str(tmp_path), CROWDED_S, TWO)
