"""How much memory there is for decode calls that other nodes put, and how much DeepEP's function asks for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenferry.backends.cuda.across.puts import region_sizes
from tokenferry.compat.deep_ep import Buffer
from tokenferry.errors import ConfigError
from tokenferry.topology import Topology, consecutive
from tokenferry.types import MoeShape

SMALLEST = MoeShape(8, 1, 16, 1)
NODES = Topology(0, consecutive(8, 2))


@pytest.mark.parametrize("num_bytes", [None, 0, 1, 1000])
def test_a_shape_has_what_it_needs(num_bytes):
    sizes = region_sizes(SMALLEST, NODES, num_bytes)
    assert sizes == region_sizes(SMALLEST, NODES)
    assert sizes.num_bytes < 100_000


@given(st.integers(1, 16), st.integers(100_000, 1 << 34))
def test_given_bytes_are_used_and_no_more(num_nodes, num_bytes):
    topology = Topology(0, consecutive(2 * num_nodes, 2))
    sizes = region_sizes(MoeShape(2 * num_nodes, 1, 16, 1), topology, num_bytes)
    assert sizes.message_bytes < 1 << 32
    if num_bytes > 400_000 and sizes.message_bytes < 1 << 30:
        assert 0.9 * num_bytes < sizes.num_bytes <= num_bytes


def test_messages_that_kernels_cannot_count():
    """In 32 bits: sizes of more were cut off, and messages overlapped."""
    with pytest.raises(ConfigError, match="has 4299161600 bytes, at most 2147483647"):
        region_sizes(MoeShape(64, 8, 16384, 65536), Topology(0, consecutive(8, 4)))


@given(st.integers(1, 300), st.integers(1, 64), st.sampled_from([2, 8, 32]), st.sampled_from([1, 7, 64, 256, 1024]))
def test_the_hint_suffices_for_bfloat16_rows(max_tokens, blocks, per_node, experts):
    """Whatever the options of the calls are."""
    num_ranks, hidden = 4 * per_node, 128 * blocks
    topology = Topology(0, consecutive(num_ranks, per_node))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENFERRY_NETWORK", "nvshmem")
        patch.setenv("TOKENFERRY_RANKS_PER_NODE", str(per_node))
        hint = Buffer.get_low_latency_rdma_size_hint(max_tokens, hidden, num_ranks, experts * num_ranks)
    shape = MoeShape(experts * num_ranks, min(64, experts * num_ranks), hidden, max_tokens)
    needed = region_sizes(shape, topology, item_bytes=2)
    assert region_sizes(MoeShape(num_ranks, 1, 16, 1), topology, hint).max_body >= needed.max_body
    assert hint <= 1.25 * needed.num_bytes + 10_000
