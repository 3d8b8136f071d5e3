"""After a fault ranks close their group, make another in the same processes, and work on."""

import gc
import os
import signal
from concurrent.futures import Future
from functools import partial

import pytest
import torch.distributed as dist

from support.lost_ranks import (
    CASE,
    CROWDED_S,
    LONG_S,
    LOST_RANK,
    Loss,
    Report,
    barrier,
    calls,
    check_late,
    expect_timeout,
    leave_note,
    lose_and_go_on,
    wait_for_others,
    work,
)
from support.pairs import CPU_PAIRS, CUDA_PAIRS, Pair
from support.worlds import run_at_once
from tokenferry import Routing
from tokenferry.testing.cases import Case
from tokenferry.testing.world import World, WorldError
from tokenferry.transports import process_group

SURVIVORS = Case((5, 3), 6, 2, hidden=64, seed=1)

REUSABLE = (CPU_PAIRS[0], *CUDA_PAIRS)
"""Not over torch.distributed: gloo closes all its connections after one timeout."""


LOSSES = {
    **{f"sleeps in {phase}": phase for phase in ("dispatch", "combine", "decode_dispatch", "decode_combine by hook")},
    **{f"never calls {phase}": phase for phase in ("dispatch", "decode_dispatch by hook", "decode_combine")},
}


@pytest.fixture(scope="module", params=REUSABLE, ids=str)
def reports(request, tmp_path_factory) -> dict[str, Future[list[Report]]]:
    """By loss, what ranks 0 and 1 report; the ranks of all losses wait at the same time."""

    def job(name: str, phase: str) -> partial:
        loss = Loss(phase, str(tmp_path_factory.mktemp("loss")), CROWDED_S, never_calls=name.startswith("never"))
        return partial(lose_and_go_on, pair=request.param, loss=loss)

    return run_at_once(3, request.param.backend, {name: job(name, phase) for name, phase in LOSSES.items()})


@pytest.mark.parametrize("name", LOSSES)
def test_ranks_go_on_together(reports, name):
    for rank, report in enumerate(reports[name].result()[:2]):
        check_late(report, rank, LOSSES[name], CROWDED_S)


def die_and_go_on(rank, pg, pair: Pair, phase: str, folder: str) -> Report:
    """Rank 2 is killed; the others make a process group of two, and a group on it."""
    barrier(pg)
    with pair.open(pg, CASE.shape, timeout_s=LONG_S) as group:
        todo = calls(group, rank)
        if rank == LOST_RANK:
            wait_for_others(folder, "is ready")
            os.kill(os.getpid(), signal.SIGKILL)
        leave_note(folder, rank, "is ready")
        report = expect_timeout(todo, phase, group)
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    work(dist.group.WORLD, pair, SURVIVORS)
    return report


@pytest.mark.parametrize("pair", REUSABLE, ids=str)
@pytest.mark.parametrize("phase", ["dispatch", "combine"])
def test_survivors_go_on(pair, phase, tmp_path):
    with World(3, devices=pair.backend) as world, pytest.raises(WorldError) as caught:
        world.run(die_and_go_on, pair, phase, str(tmp_path))
    assert set(caught.value.errors) == {LOST_RANK}, caught.value
    for rank, report in caught.value.results.items():
        assert (report.phase, report.call, report.rank) == (phase, 3, rank)
        assert LOST_RANK in report.peers or "closed" in report.text


def end_with_pending_hooks(rank, pg, pair: Pair, ending: str) -> None:
    """End a group, or mask its ranks, with messages under way that nobody will receive; then use the process group."""
    case = Case((5, 3), 6, 2, hidden=64, seed=1)
    mine = case.inputs()[rank]
    group = pair.open(pg, case.shape, timeout_s=LONG_S)
    sent = group.decode_dispatch(mine.x, Routing(mine.topk_idx, mine.topk_weights), return_hook=ending != "masked")
    if ending == "one has received" and rank == 0:
        sent.hook()
    elif ending == "masked":
        returned = group.decode_combine(sent.x, sent.plan, return_hook=True)
        group.mask(1 - rank)
        returned.hook()
        group.mask(1 - rank, masked=False)
        sent = group.decode_dispatch(mine.x, Routing(mine.topk_idx, mine.topk_weights))
    process_group._LINGER_S = 0.2  # of this process, which ends with its world
    if ending != "dropped":
        group.close()
    del group, sent
    gc.collect()
    barrier(pg)
    work(pg, pair, case)


@pytest.mark.parametrize("ending", ["closed", "dropped", "one has received", "masked"])
def test_a_group_that_ends_with_pending_hooks_leaves_the_process_group_usable(ending):
    with World(2) as world:
        world.run(end_with_pending_hooks, CPU_PAIRS[1], ending)
