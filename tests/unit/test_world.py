"""Ranks for tests: what comes back when a job fails, dies or hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tokenferry import CapacityError
from tokenferry.testing.world import World, WorldError


def scaled_rank(rank, pg, factor):
    assert pg.size() == dist.get_world_size()
    return rank * factor


def fails(rank, pg):
    if rank == 1:
        raise CapacityError("x: T=3 rows exceed max_tokens=2")
    return rank


def unpicklable(rank, pg):
    if rank == 0:
        raise type("Local", (Exception,), {})("a class that no other process knows")


def dies_or_hangs(rank, pg):
    if rank == 0:
        os._exit(3)
    if rank == 1:
        time.sleep(100)
    return rank


def test_results_by_rank_and_many_jobs():
    with World(2) as world:
        assert world.run(scaled_rank, 10) == [0, 10]
        assert world.run(scaled_rank, torch.tensor(3)) == [0, torch.tensor(3)]
        assert len(set(world.pids)) == 2
    assert not world.alive
    world.close()


def test_devices():
    with pytest.raises(ValueError, match=r'devices: expected "cpu" or "cuda", got \'gpu\''):
        World(1, devices="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r'devices="cuda" needs a GPU, torch sees none; use devices="cpu"'):
            World(1, devices="cuda")


def current_device(rank, pg):
    return torch.cuda.current_device()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_each_rank_owns_a_gpu():
    with World(2, devices="cuda") as world:
        assert world.run(current_device) == [0, 1 % torch.cuda.device_count()]


def test_errors_by_rank():
    with World(2) as world:
        with pytest.raises(WorldError, match="max_tokens=2") as caught:
            world.run(fails)
        assert list(caught.value.errors) == [1]
        assert isinstance(caught.value.errors[1], CapacityError)
        assert caught.value.results == {0: 0}
        assert not world.alive
        with pytest.raises(RuntimeError, match="make a new one"):
            world.run(scaled_rank, 1)


def test_any_exception_comes_back_as_text():
    with World(1) as world, pytest.raises(WorldError, match="a class that no other process knows"):
        world.run(unpicklable)


def test_ranks_that_die_or_hang():
    with World(3, timeout_s=1.0) as world, pytest.raises(WorldError) as caught:
        world.run(dies_or_hangs)
    assert isinstance(caught.value.errors[0], ChildProcessError)
    assert isinstance(caught.value.errors[1], TimeoutError)
    assert caught.value.results == {2: 2}
