"""Ranks for tests: what comes back when a job fails, dies or hangs."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from support import processes
from tokenferry import CapacityError, ExpertGroup, MoeShape
from tokenferry.testing import rank_server
from tokenferry.testing.rank import gpu_of
from tokenferry.testing.world import END_S, World, WorldError


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


@pytest.mark.parametrize(
    ("num_gpus", "per_node", "gpus"),
    [
        (2, None, [0, 1, 0, 1]),
        (1, 1, [0, 0, 0, 0]),
        (2, 2, [0, 1, 1, 0]),
        (4, 2, [0, 1, 2, 3]),
        (4, 4, [0, 1, 2, 3, 1, 2, 3, 0]),
        (2, 1, [0, 1, 1, 0]),
    ],
)
def test_gpus_of_ranks(num_gpus, per_node, gpus):
    assert [gpu_of(rank, num_gpus, per_node) for rank in range(len(gpus))] == gpus


def nodes_played(rank, pg):
    with ExpertGroup(pg, MoeShape(4, 2, 8, 4), backend="cpu") as group:
        return group.topology.nodes, os.environ.get("NCCL_HOSTID"), os.environ.get("NCCL_SOCKET_IFNAME")


def test_ranks_that_play_nodes():
    nodes = (0, 1), (2, 3)
    with World(4, ranks_per_node=2) as world:
        assert world.run(nodes_played) == [(nodes, f"node{rank // 2}", "lo") for rank in range(4)]
    with World(2) as world:
        assert world.run(nodes_played)[1][:2] == (((0, 1),), None)
    with pytest.raises(ValueError, match="ranks_per_node=2 does not divide 3 ranks"):
        World(3, ranks_per_node=2)


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
    with World(3) as world:
        world.run(scaled_rank, 1)  # starting takes long on a busy machine
        world.timeout_s = 4.0
        with pytest.raises(WorldError) as caught:
            world.run(dies_or_hangs)
    assert isinstance(caught.value.errors[0], ChildProcessError)
    assert str(caught.value.errors[0]) == "rank 0 died: exit status 3"
    assert isinstance(caught.value.errors[1], TimeoutError)
    assert caught.value.results == {2: 2}


def forks(rank, pg, then):
    """The forked process of rank 0 outlives it and has its pipe, or comes back from the job."""
    if rank == 0:
        if os.fork() == 0:
            if then == "return":
                return "an answer of the wrong process"
            time.sleep(40)
            os._exit(0)
        if then == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
    return rank


def test_a_process_that_a_job_forked_is_no_rank():
    with World(2, timeout_s=60) as world:
        assert world.run(forks, "return") == [0, 1]
        assert world.run(scaled_rank, 10) == [0, 10]
        start = time.monotonic()
        with pytest.raises(WorldError, match="rank 0 died: killed by SIGKILL"):
            world.run(forks, "die")
        assert time.monotonic() - start < 30, "what it forked was waited for"


def test_a_rank_that_has_died_between_jobs():
    """The next job fails, and closing does not."""
    with World(2) as world:
        world.run(scaled_rank, 1)
        os.kill(world.pids[1], signal.SIGKILL)
        with pytest.raises(WorldError, match="rank 1 died: killed by SIGKILL"):
            world.run(scaled_rank, 1)
    with World(2) as world:
        world.run(scaled_rank, 1)
        os.kill(world.pids[1], signal.SIGKILL)


def test_a_world_that_is_closed_in_the_middle_of_a_job_kills_its_ranks():
    world = World(2)
    world.submit(dies_or_hangs)
    start = time.monotonic()
    world.close()
    assert time.monotonic() - start < END_S, "they were asked to end"
    assert not set(world.pids) & set(processes.parents())


def test_a_forked_process_cannot_use_or_end_the_world():
    with World(1) as world:
        pid = os.fork()
        if pid == 0:
            try:
                with pytest.raises(RuntimeError, match="belongs to another process"):
                    world.run(scaled_rank, 1)
                world.close()
                world.kill()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert world.run(scaled_rank, 10) == [0]


def test_a_world_that_cannot_be_made_leaves_no_ranks(monkeypatch):
    """The server answers the second request with an error, as if it could not fork."""
    start, made = rank_server.RankServer.start, []

    def fail(self, store):
        if made:
            raise OSError(errno.EAGAIN, "cannot start one")
        made.append(start(self, store))
        return made[0]

    monkeypatch.setattr(rank_server.RankServer, "start", fail)
    with pytest.raises(OSError, match="cannot start one"):
        World(2)
    assert made[0].ending == "killed by SIGKILL"


def has_dtensor(rank, pg):
    return "torch.distributed.tensor" in sys.modules


def test_ranks_have_a_slow_import_of_their_program_from_the_start():
    assert has_dtensor(0, None)
    with World(1) as world:
        assert world.run(has_dtensor) == [True]


def test_a_server_that_fails_says_why_and_does_not_take_torch_down():
    code = (
        "import atexit; from tokenferry.testing import rank_server; atexit.register(print, 'taken down'); "
        "rank_server.main(99, 0, dtensor=False)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "Bad file descriptor" in ended.stderr


def test_a_server_that_was_killed_is_replaced(monkeypatch):
    """The kernel ends its ranks (Linux)."""
    monkeypatch.setattr(rank_server, "_server", None)  # not the one of the pools that other tests share
    with World(1) as world:
        server = rank_server.get_server()
        server._process.kill()
        server._process.wait()
        assert processes.left_after(30, world.pids) == {}
        with pytest.raises(WorldError, match="rank 0 died: its server died: killed by SIGKILL"):
            world.run(scaled_rank, 10)
    with World(1) as world:
        assert world.run(scaled_rank, 10) == [0]


UNGUARDED = """
from tokenferry.testing.world import World
World(1).run(abs)
"""


def test_a_program_without_a_guard_is_told_so(tmp_path):
    (tmp_path / "program.py").write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=240, check=False
    )
    assert 'make worlds below `if __name__ == "__main__":`' in done.stderr
    assert "rank 0 died: exit status 1" in done.stderr
