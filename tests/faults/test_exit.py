"""A program that ends with an open group ends at once, with nothing on stderr."""

import subprocess
import sys

import pytest

from support.pairs import NUM_GPUS

PROGRAM = """
import sys
import torch
import torch.distributed as dist
from tokenferry import ExpertGroup, MoeShape, Routing
from tokenferry.transports import process_group

rank, ranks, transport, store, left = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
if ranks > 1:
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=ranks)
pg, backend = dist.group.WORLD if ranks > 1 else None, "cpu"
if transport == "nvlink":
    backend, transport = "cuda", "auto"
    torch.cuda.set_device(rank % torch.cuda.device_count())
group = ExpertGroup(pg, MoeShape(4, 2, 16, 8), backend=backend, transport=transport, timeout_s=60)
x, weights = torch.ones(3, 16, device=group.device), torch.ones(3, 2, device=group.device)
routing = Routing(torch.tensor([[0, 1], [2, 3], [1, 2]], device=group.device), weights)
sent = group.dispatch(x, routing)
assert group.combine(sent.x, sent.plan).x.shape == (3, 16)
if left == "hook":
    got = group.decode_dispatch(x, routing, return_hook=True)
    got.hook()
if left == "message":
    process_group._LINGER_S = 0.2
    got = group.decode_dispatch(x, routing, return_hook=True)
    if rank == 0:
        got.hook()
    group.close()  # rank 0 waits for rank 1, which never receives
    dist.barrier()
if left == "error":
    raise SystemExit(7)
print("done", rank)
"""


ON_CPU = [
    (1, "auto", "process_group"),
    (2, "shared_memory", "process_group"),
    (2, "shared_memory", "hook"),
    (2, "shared_memory", "error"),
    (2, "process_group", "hook"),
    (2, "process_group", "message"),
]
ON_GPU = [(1, "nvlink", "process_group"), (2, "nvlink", "process_group"), (2, "nvlink", "hook"), (2, "nvlink", "error")]


@pytest.mark.parametrize(("ranks", "transport", "left"), ON_CPU + (ON_GPU if NUM_GPUS else []))
def test_a_program_with_an_open_group_ends_at_once(ranks, transport, left, tmp_path):
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(ranks), transport, str(tmp_path / "store"), left],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for rank, program in enumerate(programs):
            out, err = program.communicate(timeout=100)
            assert err == ""
            assert program.returncode == (7 if left == "error" else 0)
            assert out == ("" if left == "error" else f"done {rank}\n")
    finally:
        for program in programs:
            program.kill()
            program.wait()
