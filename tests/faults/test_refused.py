"""Resources that the system refuses: an error with the limit on the rank that suffers, and at once on all others."""

import re

import pytest

from support.lost_ranks import PHASES
from support.pairs import CPU_PAIRS
from support.refusals import (
    free_memory_on_close,
    make_where_cuda_cannot_be_loaded,
    refuse_at_every_moment,
    refuse_descriptors,
    refuse_memory,
)
from tokenferry.testing.world import World


@pytest.mark.parametrize("pair", CPU_PAIRS, ids=str)
@pytest.mark.parametrize("phase", PHASES)
def test_a_refusal_at_any_moment_reaches_every_rank(worlds, pair, phase):
    assert worlds(3).run(refuse_at_every_moment, pair, phase) == [[], [], []]


@pytest.mark.parametrize("poor", [0, 1])
def test_descriptors_that_run_out_in_a_call(worlds, poor):
    """The poor rank cannot make a segment, receive that of its peer, or map it, depending on how many are left."""
    endings = set()
    for spare in range(8):
        texts = worlds(2).run(refuse_descriptors, poor, spare)
        mine, theirs = texts[poor], texts[1 - poor]
        if mine == theirs == "done":
            endings.add("done")
            continue
        assert re.match(rf"ResourceError: dispatch #\d: rank {poor}: ", mine), mine
        assert "file descriptors refused (EMFILE: Too many open files); RLIMIT_NOFILE is " in mine
        assert re.match(rf"PeerTimeout: dispatch #\d: rank {1 - poor} waited \S* s for rank {poor}: ", theirs), theirs
        assert f"it left the group: {mine}" in theirs
        endings.add(next((word for word in ("cannot allocate", "cannot receive") if word in mine), "cannot map"))
    assert endings == {"cannot allocate", "cannot receive", "cannot map", "done"}


@pytest.mark.parametrize("pair", CPU_PAIRS, ids=str)
def test_memory_that_runs_out_in_a_call(pair):
    """With gloo this may end the process group, so the ranks have one of their own."""
    with World(2) as world:
        other, poor = world.run(refuse_memory, pair)
    assert re.match(
        r"ResourceError: dispatch #\d: rank 1: memory refused \(ENOMEM: .*\); RLIMIT_AS is \d+ bytes", poor
    ), poor
    if pair.transport == "shared_memory":
        assert f"for rank 1: it left the group: {poor}" in other


@pytest.mark.parametrize("pair", CPU_PAIRS, ids=str)
def test_a_closed_group_holds_no_memory(worlds, pair):
    for before, while_open, after in worlds(2).run(free_memory_on_close, pair):
        assert after == before
        assert while_open > before + (1 << 20)


def test_a_rank_that_cannot_load_the_cuda_backend_tells_the_others(worlds):
    """Its import fails, such as for want of descriptors: the others must not wait for its answer until the deadline."""
    found = worlds(3).run(make_where_cuda_cannot_be_loaded, 1)
    assert [backend for backend, _ in found] == ["cpu"] * 3
    assert all(
        "not cuda: rank 1 has no CUDA device that works: the CUDA backend cannot be loaded" in log for _, log in found
    )
