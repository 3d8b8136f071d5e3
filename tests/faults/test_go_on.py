"""After a fault ranks close their group, make another in the same processes, and work on."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_lost_ranks import (
    BAD_RANK,
    CASE,
    SHORT_S,
    Told,
    await_others,
    calls,
    check_late,
    listen,
    patience,
    together,
    twice,
)

from support.decoding import Step, check_combined, check_received
from support.pairs import CPU_PAIRS, CUDA_PAIRS, Pair
from support.throughput import all_options, check_round_trip
from tokenferry import TokenferryError
from tokenferry.testing.cases import Case
from tokenferry.testing.world import World, WorldError

SURVIVORS = Case((5, 3), 6, 2, hidden=64, seed=1)

# Not over torch.distributed: gloo closes all its connections after one timeout.
reusable = pytest.mark.parametrize("pair", [CPU_PAIRS[0], *CUDA_PAIRS], ids=str)


def lose_and_go_on(rank, pg, pair: Pair, phase: str, how: str, folder: str) -> Told | None:
    """Rank 2 is late or does not call at all; then all three make a new group."""
    together(pg)
    told = None
    with pair.open(pg, CASE.shape, timeout_s=SHORT_S) as group:
        todo = calls(group, rank)
        if rank != BAD_RANK:
            told = listen(todo, phase, group)
            Path(folder, f"{rank} was told").touch()
        else:
            await_others(folder)
            if how == "sleeps":
                with pytest.raises(TokenferryError):
                    twice(group, todo[phase])
    together(pg)
    work(pg, pair, CASE)
    return told


def work(pg, pair: Pair, case: Case) -> None:
    with pair.open(pg, case.shape) as group:
        for options in all_options(case)[::3]:
            check_round_trip(group, case, options)
        step = Step(case, group.rank)
        sent = group.decode_dispatch(step.mine().x, step.routing())
        check_received(step, sent, None)
        check_combined(group, step, sent, torch.bfloat16)


@reusable
@pytest.mark.parametrize(
    ("how", "phase"),
    [
        *(("sleeps", phase) for phase in ("dispatch", "combine", "decode_dispatch", "decode_combine by hook")),
        *(("never calls", phase) for phase in ("dispatch", "decode_dispatch by hook", "decode_combine")),
    ],
)
def test_ranks_go_on_together(pair, how, phase, tmp_path):
    with World(3, devices=pair.backend) as world:
        results = world.run(lose_and_go_on, pair, phase, how, str(tmp_path))
    for rank in (0, 1):
        check_late(results[rank], rank, phase)


def die_and_go_on(rank, pg, pair: Pair, phase: str, folder: str) -> Told:
    """Rank 2 is killed; the others make a process group of two, and a group on it."""
    together(pg)
    with pair.open(pg, CASE.shape, timeout_s=patience(pair)) as group:
        todo = calls(group, rank)
        if rank == BAD_RANK:
            await_others(folder, "is ready")
            os.kill(os.getpid(), signal.SIGKILL)
        Path(folder, f"{rank} is ready").touch()
        told = listen(todo, phase, group)
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    work(dist.group.WORLD, pair, SURVIVORS)
    return told


@reusable
@pytest.mark.parametrize("phase", ["dispatch", "combine"])
def test_survivors_go_on(pair, phase, tmp_path):
    with World(3, devices=pair.backend) as world, pytest.raises(WorldError) as caught:
        world.run(die_and_go_on, pair, phase, str(tmp_path))
    assert set(caught.value.errors) == {BAD_RANK}, caught.value
    for rank, told in caught.value.results.items():
        assert (told.phase, told.call, told.rank) == (phase, 3, rank)
        assert BAD_RANK in told.peers or "closed" in told.text
